"""Fetch the default model, the texts and the pictures, so that no lesson waits: what `make` runs once."""

import sys

from lightlib.fetch import FetchError, home
from lightlib.quantum.signals import picture
from lightlib.zoo import load_model, load_text

if __name__ == "__main__":
    try:
        load_model()
        load_text("prose")
        picture()
    except FetchError as error:
        sys.exit(str(error))
    print(f"The model, the texts and the pictures are in {home()}")
