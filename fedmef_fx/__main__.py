"""`python -m fedmef_fx`: the command line without its script."""

from fedmef_fx.cli import main

if __name__ == "__main__":
    main()
