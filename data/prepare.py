"""Fetch the default model and the texts, so that no lesson waits for the network: what `make` runs once."""

import sys

from lightlib.fetch import FetchError, home
from lightlib.zoo import load_model, load_text

if __name__ == "__main__":
    try:
        load_model()
        load_text("prose")
    except FetchError as error:
        sys.exit(str(error))
    print(f"The model and the texts are in {home()}")
