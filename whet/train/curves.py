"""TensorBoard and Weights & Biases: the run's numbers as curves, where these are installed."""

import contextlib
import hashlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whet.errors import UserError


@dataclass
class Curves:
    """Where numbers are drawn; with nothing in it, nowhere."""

    tensorboard: Any = None
    wandb: Any = None
    missing: list[str] = field(default_factory=list)
    """What is not installed, to be told once."""

    def add(self, step: int, values: dict[str, float]) -> None:
        """Draw the numbers among `values`. A full disk or a lost network must not end a run."""
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        with contextlib.suppress(OSError):
            if self.tensorboard is not None:
                for key, value in numbers.items():
                    self.tensorboard.add_scalar(key, value, step)
            if self.wandb is not None:
                self.wandb.log(numbers, step=step)

    def close(self) -> None:
        """Write out what waits."""
        with contextlib.suppress(OSError):
            if self.tensorboard is not None:
                self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish()


def open_curves(folder: Path, step: int, wandb_project: str | None, config: dict) -> Curves:
    """Open TensorBoard if it is installed, and W&B if a project is given.

    `step` is where the run continues: points after it, drawn before a kill, are dropped.
    """
    curves = Curves()
    if importlib.util.find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter

        curves.tensorboard = SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1 if step else None
        )
    else:
        curves.missing.append("tensorboard is not installed: no curves; pip install tensorboard")
    if wandb_project:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb_project: wandb is not installed; pip install wandb") from None
        curves.wandb = wandb.init(
            project=wandb_project,
            name=folder.name,
            # The same folder is the same run, also when it is continued.
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=config,
        )
    return curves
