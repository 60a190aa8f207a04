"""`latent-dmmd COMMAND …`, also as `python -m latent_dmmd` and `accelerate launch -m latent_dmmd`."""

import sys
from importlib import import_module

from latent_dmmd import __version__
from latent_dmmd.commands import COMMANDS
from latent_dmmd.utils.cli import run
from latent_dmmd.utils.errors import did_you_mean

PROGRAM = "latent-dmmd"


def help_text() -> str:
    """All commands by group, with an example each."""
    lines = [f"usage: {PROGRAM} COMMAND [OPTIONS]", "", "Deep MMD gradient flow in the latent space of an autoencoder."]
    group = None
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines += ["", f"{group}:"]
        lines += [f"  {name:<21}{command.summary}", f"  {'':<21}  {PROGRAM} {command.example}"]
    lines += ["", f"{PROGRAM} COMMAND --help shows the options of a command, {PROGRAM} --version the version."]
    lines += ["On several processes, train and sample: accelerate launch -m latent_dmmd COMMAND [OPTIONS]"]
    return "\n".join(lines)


def main() -> None:
    """Run the command that the first word names; one that does not exist is an error with the nearest one."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(help_text())
    elif name in ("--version", "-V"):
        print(f"{PROGRAM} {__version__}")
    elif name in COMMANDS:
        sys.argv = [f"{PROGRAM} {name}", *arguments]  # the name that usage and errors begin with
        run(import_module(f"latent_dmmd.commands.{name.replace('-', '_')}").main)
    else:
        near = did_you_mean(name.replace("_", "-"), COMMANDS, cutoff=0.55)
        hint = near or f"; {PROGRAM} --help lists the commands"
        print(f"{PROGRAM}: no command {name!r}{hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
