"""Ranks: torchrun's environment, DDP, FSDP2, the gradient factor, and exchanges between ranks.

One process is the special case of one rank without a process group. Every function that talks to
other ranks must be called by all of them, whatever their data; nothing here is called from a branch
that depends on a rank's own rows.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from whet.errors import UserError, tell
from whet.model.foreign import ForeignModel

SETUP_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    background: dist.ProcessGroup | None = None
    """A gloo group for saves alone: they run beside the steps, and must not mix with them."""
    setup: dist.ProcessGroup | None = None
    """A gloo group for all others, who wait while rank 0 tokenises, or asks a server, for hours."""

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def start_ranks(device: str = "auto", timeout_s: float = 600.0) -> Iterator[Ranks]:
    """Join the ranks that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or be the only one."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; --device cpu runs anywhere")
    size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started local rank {local_rank}, but this machine has "
                f"{torch.cuda.device_count()} GPUs: --nproc_per_node must not exceed that"
            )
        torch.cuda.set_device(local_rank)
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if size == 1:
        yield Ranks(device=place)
        return
    with _process_group(place, timeout_s) as ranks:
        yield ranks


@contextmanager
def _process_group(device: torch.device, timeout_s: float) -> Iterator[Ranks]:
    """Join the others; where the block fails on this rank, its process ends."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    # torchrun keeps its store over restarts. Without a name of their own, ranks that were started
    # again would read the addresses of dead ones there, and wait for them.
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"attempt_{restarts()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        background = dist.new_group(backend="gloo", timeout=timeout)
        setup = dist.new_group(backend="gloo", timeout=SETUP_TIMEOUT)
        yield Ranks(dist.get_rank(), size, device, background, setup)
    except BaseException as error:
        _leave(error)
    dist.destroy_process_group()


def _leave(error: BaseException) -> NoReturn:
    """Tell why this rank fails, and end its process at once, so that the others notice.

    Nothing is torn down: operations may be under way, and then gloo's destructor can wait for ever.
    It holds Python's lock and joins a thread that needs that lock to drop its last operation.
    """
    code = 1
    if isinstance(error, UserError):
        tell(error)
        code = 2
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    elif _is_about_others(error):
        print(
            f"whet: rank {dist.get_rank()} ends, since another rank has ended or has not answered "
            f"for --rank_timeout seconds; look for its own message ({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_about_others(error: BaseException) -> bool:
    """Whether an exchange with other ranks failed; gloo says so by its text alone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/transport/" in str(error)
    )


def restarts() -> int:
    """How often torchrun started the ranks again after one had died (`--max_restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def job() -> str:
    """The id of torchrun's job, the same for all of its restarts; empty without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def ranks_on_machine() -> int:
    """How many ranks torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def spread(model: nn.Module, ranks: Ranks, *, shard: bool, bf16: bool) -> nn.Module:
    """Wrap `model`, which lies on `ranks.device`, for its several ranks."""
    if not shard:
        from torch.nn.parallel import DistributedDataParallel

        # Other architectures may have parts that no text reaches, such as a tower for images.
        unused = any(isinstance(part, ForeignModel) for part in model.modules())
        return DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=unused
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    # Weights are gathered in the precision of the matrix products; gradients are summed in float32.
    # Inputs are left alone: token weights must keep their float32.
    halves = bf16 and ranks.device.type == "cuda"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if halves else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in getattr(model, "layers", ()):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The model without DDP around it: for parameter names, evaluation and saving."""
    return getattr(model, "module", model) if is_replicated(model) else model


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """All weights by name, on the CPU of rank 0, if the model is sharded; else None.

    All ranks call it.
    """
    if not is_sharded(model):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]


def is_replicated(model: nn.Module) -> bool:
    """Whether DDP is around the model."""
    return isinstance(model, nn.parallel.DistributedDataParallel)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model: then every forward pass is a collective of all ranks."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Give each rank its shards again, and no more; does nothing to a model that is not sharded.

    FSDP2 leaves the outermost parameters whole after a forward pass without a backward one. Then
    they are not those that the optimizer knows, and a state could not be saved.
    """
    if not is_sharded(model):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gradient_factor(model: nn.Module, ranks: Ranks) -> float:
    """What a rank multiplies its loss by, so that the gradients come out as sums over the ranks.

    DDP and FSDP2 both average gradients over the ranks. The loss is a sum over this rank's tokens
    divided by the weight of the whole global batch, so what is wanted is the ranks' sum.
    """
    return float(ranks.size) if is_replicated(model) or is_sharded(model) else 1.0


def sync_gradients(model: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """Around a micro-batch: exchange gradients only after the last one of a step.

    FSDP2 reduces after every micro-batch: holding whole gradients would undo what sharding saves.
    """
    if is_replicated(model) and not now:
        return model.no_sync()  # type: ignore[operator]
    return contextlib.nullcontext()


def gradient_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Euclidean norm over all gradients of all ranks: a scalar that is equal on every rank."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def scale_gradients(parameters: Sequence[nn.Parameter], norm: torch.Tensor, clip: float) -> None:
    """Scale the gradients so that their norm, which is `norm` now, is at most `clip`."""
    factor = torch.clamp(clip / (norm + 1e-6), max=1.0)
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    if local:
        torch._foreach_mul_(local, factor.to(local[0].device))


def sum_over_ranks(values: Sequence[float], ranks: Ranks) -> list[float]:
    """Element-wise sum of `values` over the ranks, in float64."""
    total = torch.tensor(list(values), dtype=torch.float64, device=ranks.device)
    return add_over_ranks(total, ranks).tolist()


def add_over_ranks(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """`values`, on `ranks.device`, summed over the ranks in place, without waiting for a GPU."""
    if ranks.size > 1:
        dist.all_reduce(values)
    return values


def gather(value: Any, ranks: Ranks, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value`, in the order of ranks, on every rank."""
    if ranks.size == 1:
        return [value]
    values: list[Any] = [None] * ranks.size
    dist.all_gather_object(values, value, group=group)
    return values


def from_first(value: Any, ranks: Ranks, group: dist.ProcessGroup | None) -> Any:
    """Rank 0's `value`, on every rank, through `ranks.setup` or `ranks.background`."""
    if ranks.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def wait_for_all(ranks: Ranks) -> None:
    """Wait for all ranks, however long one takes: rank 0 writes and verifies a large model for
    longer than `--rank_timeout`."""
    gather(None, ranks, ranks.setup)


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """Let all ranks leave together if any raises UserError in the block; report each problem once.

    For what comes before the steps: ranks wait here as long as another one takes. Rank 0 raises all
    ranks' problems; the others leave with the same exit code and say nothing. The block must hold
    no collective of its own: a rank that fails would miss it.
    """
    lines: list[str] = []
    try:
        yield
    except UserError as error:
        lines = str(error).splitlines()
    everybody = dict.fromkeys(line for found in gather(lines, ranks, ranks.setup) for line in found)
    if everybody and ranks.first:
        raise UserError("\n".join(everybody))
    if everybody:
        raise SystemExit(2)
