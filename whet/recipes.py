"""`whet configs`: the TOML files that come with Whet, recipes for many models and machines."""

from whet.config import SHIPPED
from whet.errors import UserError
from whet.flags.configs import Config
from whet.progress import say


def main(config: Config) -> int:
    """List them with what they hold, or print the one that is named."""
    found = {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}
    if config.name is None:
        for name, path in found.items():
            about = path.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
            say(f"{name:<26} {about}")
        return 0
    name = config.name.removesuffix(".toml")
    if name not in found:
        raise UserError(f"whet configs {config.name}: there is none; there are {', '.join(found)}")
    say(found[name].read_text(encoding="utf-8").rstrip())
    return 0
