"""``python -m blockvirt``."""

from blockvirt.cli.main import main

if __name__ == "__main__":
    main()
