"""Has SGLang run on the CPU. Imported before it; processes that are started from here follow."""

import os
import sys
from pathlib import Path

KERNELS = str(Path(__file__).with_name("kernels"))

sys.path.insert(0, KERNELS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [KERNELS, os.environ.get("PYTHONPATH")]))
# SGLang compiles its hash of pages when it is first used, with a `ninja` beside the interpreter.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "extensions")))
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that wait for each other take their cores from the scheduler's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
