# The compiled module. Its functions take what _arrays.py makes of arrays; csrc/python/ says what each one does.
from typing import Any

def __getattr__(name: str) -> Any: ...
