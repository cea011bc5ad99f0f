"""Run a kernel's library on saved arguments, without torch: what ThreadSanitizer watches.

python run_library.py LIBRARY ARGUMENTS.npz SHARED_BYTES
"""

import ctypes
import sys

import numpy as np

library, file, shared_bytes = sys.argv[1:]
saved = np.load(file)
arrays = [saved[f"array{i}"] if kind < 0 else int(kind) for i, kind in enumerate(saved["kinds"])]
values = [ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(a.ctypes.data) for a in arrays]
pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
sys.exit(ctypes.CDLL(library).launch(*map(int, saved["grid"]), int(shared_bytes), pointers))
