"""`whet push`: a model on the Hugging Face Hub, through huggingface_hub, with a model card.

What goes up are the files that open the model, never states, logs or ledgers of its run. Paths of
this machine stay here: the card and the uploaded `whet.json` hold the last part of each.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from whet.config import problems
from whet.errors import UserError
from whet.files import read_json, read_text
from whet.flags.push import Config
from whet.hub import MODEL_FILES, first_line, is_adapter, is_hub_name, is_of_network
from whet.progress import say


def main(config: Config) -> int:
    """Run `whet push`."""
    files = files_of(config.run)
    problems(flaws_of(config.run, files))
    lineage = public_lineage(config.run)
    own = config.run / "README.md"
    card = read_text(own) if own.is_file() else ""
    texts = {"README.md": card or model_card(config.run, config.name, lineage)}
    if lineage:
        texts["whet.json"] = json.dumps(lineage, indent=2, ensure_ascii=False) + "\n"
    url = _upload(config, files, texts)
    say(f"{len(files) + len(texts)} files are at {url}")
    return 0


def _upload(config: Config, files: Iterable[Path], texts: Mapping[str, str]) -> str:
    """One commit of all files; returns the address of the repository."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    api, name = hub.HfApi(), config.name
    operations = [
        hub.CommitOperationAdd(path.relative_to(config.run).as_posix(), path) for path in files
    ]
    operations += [hub.CommitOperationAdd(title, text.encode()) for title, text in texts.items()]
    try:
        api.create_repo(name, private=not config.public, exist_ok=True)
        if config.revision is not None:
            api.create_branch(name, branch=config.revision, exist_ok=True)
        done = api.create_commit(
            name, operations, commit_message="whet push", revision=config.revision
        )
        return str(done.repo_url)
    except errors.LocalTokenNotFoundError:
        raise UserError(f"{name}: {_LOG_IN}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = _LOG_IN if status in (401, 403) else first_line(error)
        raise UserError(f"{name}: {reason}") from None
    except errors.OfflineModeIsEnabled:
        raise UserError(f"{name}: HF_HUB_OFFLINE is set") from None
    except Exception as error:
        if not is_of_network(error):
            raise
        reason = f"the Hub did not answer ({first_line(error)}); nothing was changed"
        raise UserError(f"{name}: {reason}") from None


_LOG_IN = "log in with a token that may write there (hf auth login, or HF_TOKEN)"


def files_of(folder: Path) -> list[Path]:
    """The files of the model in `folder`."""
    patterns = (*MODEL_FILES, "*.gguf", "Modelfile")
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def flaws_of(folder: Path, files: Iterable[Path]) -> list[str]:
    """Why the folder can't be opened by those who download it; empty if it can."""
    names = {path.name for path in files}
    if not names & {"config.json", "adapter_config.json"} and not any(
        name.endswith(".gguf") for name in names
    ):
        return [f"{folder}: holds no model; is it the folder of an unfinished run?"]
    if "config.json" in names and not any(name.endswith(".safetensors") for name in names):
        return [f"{folder}: has config.json, but no weights in safetensors form"]
    if is_adapter(folder):
        base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
        if not is_hub_name(base) or Path(base).exists():
            return [
                f"{folder}: an adapter of {base}, which is a path of this machine: nobody else "
                f"could open it; whet export {folder} --merge --out DIR makes a whole model"
            ]
    return []


def public_lineage(folder: Path) -> dict[str, Any]:
    """`whet.json` without this machine's paths."""
    if not (folder / "whet.json").is_file():
        return {}
    return {key: _public(value) for key, value in read_json(folder / "whet.json").items()}


def _public(value: Any) -> Any:
    """`value` with the last part of each path only."""
    if isinstance(value, dict):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_public(each) for each in value]
    path = isinstance(value, str) and "/" in value
    return Path(value).name if path and (not is_hub_name(value) or Path(value).exists()) else value


def model_card(folder: Path, name: str, lineage: Mapping[str, Any]) -> str:
    """The README.md: what the model comes from, what it learnt and how well."""
    base = lineage.get("base") or lineage.get("base_model")
    if is_adapter(folder):
        base = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    front = ["---", "tags:", "- whet", "pipeline_tag: text-generation"]
    library = "transformers" if (folder / "config.json").is_file() else "gguf"
    front.append(f"library_name: {'peft' if is_adapter(folder) else library}")
    if isinstance(base, str) and is_hub_name(base):
        front.append(f"base_model: {base}")
    title = name.partition("/")[2]
    stage = lineage.get("stage")
    made = f"Trained by Whet (stage `{stage}`)" if stage else "Made by Whet"
    lines = [*front, "---", "", f"# {title}", ""]
    lines += [f"{made}{f' from `{base}`' if base else ''}.", ""]
    facts = {key: v for key, v in lineage.items() if key not in ("metrics", "exported_from")}
    lines += _table("Where it comes from", facts)
    lines += _table("Metrics at the end of training", lineage.get("metrics") or {})
    settings = folder / "config.toml"
    if settings.is_file():
        words = [_without_paths(line) for line in read_text(settings).splitlines()]
        lines += ["## Settings", "", "```toml", *words, "```", ""]
    template = folder / "chat_template.jinja"
    if template.is_file():
        text = read_text(template).rstrip("\n")
        fence = "`" * 4
        lines += ["## Chat template", "", f"{fence}jinja", text, fence, ""]
    return "\n".join(lines)


def _table(title: str, values: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {key} | {f'{value:.6g}' if isinstance(value, float) else value} |"
        for key, value in values.items()
        if value is not None and not isinstance(value, dict | list)
    ]
    return [f"## {title}", "", "| | |", "|---|---|", *rows, ""] if rows else []


def _without_paths(line: str) -> str:
    """A line of a TOML file; of a text that is a path its last part."""
    key, equals, value = line.partition(" = ")
    if equals and value.startswith('"'):
        return f"{key} = {json.dumps(_public(json.loads(value)), ensure_ascii=False)}"
    return line
