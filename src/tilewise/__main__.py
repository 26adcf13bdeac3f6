"""`python -m tilewise`: the same as the command `tilewise`."""

import sys


def main() -> None:
    """Runs the command line; Ctrl-C while it is still being imported ends it as quietly as later on."""
    try:
        from tilewise.ui.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
