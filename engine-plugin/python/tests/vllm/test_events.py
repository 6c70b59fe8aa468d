"""`kvasir-index` following unmodified vLLM: `make test-vllm`."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_vllm import BLOCK, ENGINE, MODELS, Engine, workload

# Built beside the daemon.
INDEX = str(Path(os.environ["KVASIRD"]).with_name("kvasir-index"))
ASK = Path(__file__).with_name("ask_index.py")
