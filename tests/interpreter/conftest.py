"""Tests of Triton kernels in its interpreter, on the CPU: `TRITON_INTERPRET=1 pytest tests/interpreter`.

The variable must be set before Triton is imported, and kernels read under it can no longer be compiled: so these tests
run in a process of their own, which `tests/test_interpreter.py` starts.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
