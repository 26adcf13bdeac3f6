"""`python -m tilewise`: the same as the command `tilewise`."""

from tilewise.ui.cli import main

if __name__ == "__main__":
    main()
