"""`python -m ds_pretrain` and `ds-pretrain`. A plug-in that does not import is a mistake of the user's like any other."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from ds_pretrain import cli
    except ValueError as error:  # plug-ins are imported with the objectives
        print(f"error {error}", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
