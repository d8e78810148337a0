"""The operations, readable and slow: the definition, the tests' oracle, the benchmark's baseline.

Plain PyTorch (and SciPy-free NumPy for the distances); nothing here calls the compiled module.
"""

from __future__ import annotations

# ---- losses ---------------------------------------------------------------------------------------

# ---- distances ------------------------------------------------------------------------------------

# ---- metrics --------------------------------------------------------------------------------------
