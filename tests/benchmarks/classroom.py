"""A class on one JupyterHub: what each student takes, and how a slider answers while everybody moves one.

``python -m tests.benchmarks.classroom`` starts a hub on loopback with classes of 1, 5 and 10 students, or of the
numbers given. It needs the packages of the extra "hub" and configurable-http-proxy (npm), found on the PATH or in the
variable QLAB_PROXY. In each class all students start at once: their servers, a kernel each, every cell of lesson 03.
Then each moves the first slider of its first live figure, 0.25 to 1 second after each answer.

The students speak the kernel protocol through the hub's proxy as JupyterLab does, but are no browsers: in a class
those run on the students' machines, and here they would take the processor that is to be measured. A move is answered
when the bytes of the new picture have arrived.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
from jupyter_server.services.kernels.connection.base import deserialize_msg_from_ws_v1, serialize_msg_to_ws_v1
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from tests.benchmarks.footprint import NOTEBOOKS

SIZES = 1, 5, 10
PAUSE = 0.25, 1.0  # seconds between an answer and the next move
WARM_UP, MOVES = 3, 120  # of each student
PROTOCOL = "v1.kernel.websocket.jupyter.org"
LAB_PAGE = (  # what a browser asks for before the notebook; the server keeps some of it in memory
    "lab", "lab/api/settings", "lab/api/translations", "lab/api/workspaces/default", "api/contents?content=1",
    "api/kernelspecs", "api/terminals",
)
CONFIG = """
c.JupyterHub.bind_url, c.JupyterHub.hub_bind_url, c.ConfigurableHTTPProxy.api_url = {addresses}
c.ConfigurableHTTPProxy.command = [{proxy!r}]
c.JupyterHub.authenticator_class, c.DummyAuthenticator.password = "dummy", {token!r}
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class, c.SimpleLocalProcessSpawner.home_dir_template = "simple", "{folder}/{{username}}"
c.Spawner.cmd = [{python!r}, "-m", "jupyterhub.singleuser"]
c.Spawner.args, c.Spawner.http_timeout, c.Spawner.start_timeout = ["--allow-root"], 300, 300
c.JupyterHub.services = [{{"name": "teacher", "api_token": {token!r}}}]
c.JupyterHub.load_roles = [
    {{"name": "teacher", "services": ["teacher"], "scopes": ["admin:users", "admin:servers", "access:servers"]}}
]
"""


def find_proxy():
    """Path of configurable-http-proxy, or None."""
    return os.environ.get("QLAB_PROXY") or shutil.which("configurable-http-proxy")


class Hub:
    """A JupyterHub in its own folder, and a service of it that may do what a teacher may."""

    def __init__(self, folder):
        self.folder, self.token = Path(folder).resolve(), secrets.token_hex(16)
        with contextlib.ExitStack() as probes:  # open at once, so that the ports differ
            ports = [probes.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
        self.address, *others = [f"http://127.0.0.1:{port}" for port in ports]
        config = self.folder / "jupyterhub_config.py"
        config.write_text(CONFIG.format(addresses=(self.address, *others), proxy=find_proxy(), token=self.token,
                                        python=sys.executable, folder=folder))
        with open(self.folder / "log", "w") as log:
            self.process = psutil.Popen([sys.executable, "-m", "jupyterhub", "-f", config], cwd=folder, stdout=log,
                                        stderr=subprocess.STDOUT)

    async def ask(self, path, body=None, method=None):
        """What the hub, or a student's server behind its proxy, answers; None if that is not JSON."""
        request = HTTPRequest(
            f"{self.address}/{path}", method or ("GET" if body is None else "POST"),
            {"Authorization": f"token {self.token}"}, None if body is None else json.dumps(body), request_timeout=300,
        )
        try:
            response = await AsyncHTTPClient().fetch(request)
        except HTTPClientError as error:
            error.add_note(self.log())
            raise
        is_json = response.headers.get("Content-Type", "").startswith("application/json") and response.body
        return json.loads(response.body) if is_json else None

    async def wait_until_up(self):
        while self.process.poll() is None:
            with contextlib.suppress(OSError, HTTPClientError):  # no proxy yet, then a proxy without a hub
                return await self.ask("hub/api/users")
            await asyncio.sleep(0.1)
        raise RuntimeError(f"JupyterHub ended at once:\n{self.log()}")

    def log(self):
        return (self.folder / "log").read_text()[-3000:]

    def close(self):
        with contextlib.suppress(psutil.Error):
            self.process.terminate()  # it stops its proxy and its students' servers
            self.process.wait(60)
        for process in psutil.process_iter(["cwd"]):  # what a hub that broke down has left
            if (process.info["cwd"] or "").startswith(str(self.folder)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def processes(self):
        """{"hub": [hub and proxy], "server": [...], "kernel": [...]}"""
        children = self.process.children()
        servers = [child for child in children if "singleuser" in " ".join(child.cmdline())]
        return {"hub": [self.process, *(child for child in children if child not in servers)], "server": servers,
                "kernel": [kernel for server in servers for kernel in server.children()]}

    def memory(self):
        """Megabytes: {"hub": (USS, PSS), ...}, of all processes of the kind together."""
        def counts(process):
            info = process.memory_full_info()
            return np.array([info.uss, info.pss]) / 1e6

        return {kind: sum(map(counts, processes)) for kind, processes in self.processes().items()}

    def processor_seconds(self):
        """Of everything that the hub runs: user and system time so far."""
        times = [process.cpu_times() for some in self.processes().values() for process in some]
        return sum(spent.user + spent.system for spent in times)


class Student:
    """One student: a server, and at most one open lesson with its kernel."""

    def __init__(self, hub, name, seed):
        self.hub, self.name, self.rng = hub, name, np.random.default_rng(seed)
        home = hub.folder / name
        home.mkdir(exist_ok=True)
        for notebook in NOTEBOOKS:
            shutil.copy(notebook, home)

    def ask_server(self, path, *arguments):
        return self.hub.ask(f"user/{self.name}/{path}", *arguments)

    async def start(self):
        await self.hub.ask(f"hub/api/users/{self.name}/server", {})
        while not (await self.hub.ask(f"hub/api/users/{self.name}"))["servers"].get("", {}).get("ready"):
            await asyncio.sleep(0.2)
        for path in LAB_PAGE:
            await self.ask_server(path)

    async def stop(self):
        self.socket.close()
        await self.hub.ask(f"hub/api/users/{self.name}/server", method="DELETE")
        while (await self.hub.ask(f"hub/api/users/{self.name}"))["servers"]:
            await asyncio.sleep(0.2)

    async def open(self, lesson):
        """Open the notebook and run all its cells."""
        notebook = (await self.ask_server(f"api/contents/{lesson}?content=1"))["content"]
        self.session = await self.ask_server("api/sessions", {"path": lesson, "name": lesson, "type": "notebook",
                                                              "kernel": {"name": "python3"}})
        address = f"user/{self.name}/api/kernels/{self.session['kernel']['id']}/channels?session_id={self.name}"
        request = HTTPRequest(f"{self.hub.address}/{address}".replace("http", "ws", 1),
                              headers={"Authorization": f"token {self.hub.token}"})
        self.socket = await websocket_connect(request, subprotocols=[PROTOCOL])
        models = {}
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                continue
            async for kind, content, _ in self.say("execute_request", code=cell["source"], silent=False,
                                                   store_history=True, user_expressions={}, allow_stdin=False):
                if kind == "error":
                    raise RuntimeError(f"{lesson}, {cell['source']!r}: {content['ename']}: {content['evalue']}")
                if kind == "comm_open":
                    models[content["comm_id"]] = content["data"]["state"]
        first = {state["_model_name"]: comm for comm, state in reversed(models.items())}
        self.slider, self.image = first.get("FloatSliderModel"), first["ImageModel"]
        self.range = models.get(self.slider)

    async def close(self):
        self.socket.close()
        await self.ask_server(f"api/sessions/{self.session['id']}", None, "DELETE")

    async def say(self, kind, **content):
        """Send the kernel a message; gives (type, content, buffers) of what it publishes until it is done with that."""
        header = {"msg_id": secrets.token_hex(16), "msg_type": kind, "session": self.name, "username": self.name,
                  "date": datetime.now(UTC).isoformat(), "version": "5.4"}
        parts = [json.dumps(part).encode() for part in (header, {}, {}, content)]  # no parent, no metadata
        await self.socket.write_message(serialize_msg_to_ws_v1(parts, "shell"), binary=True)
        while True:
            received = await self.socket.read_message()
            if received is None:
                raise ConnectionError(f"{self.name}'s kernel has hung up")
            channel, (head, parent, _, body, *buffers) = deserialize_msg_from_ws_v1(received)
            if channel == "iopub" and json.loads(parent).get("msg_id") == header["msg_id"]:
                kind, content = json.loads(head)["msg_type"], json.loads(body)
                if kind == "status" and content["execution_state"] == "idle":
                    return
                yield kind, content, buffers

    async def move(self):
        """Move the slider to another of its steps; gives the milliseconds until the new picture is here."""
        low, high, step, present = (self.range[name] for name in ("min", "max", "step", "value"))
        places = np.arange(low, high - 0.05 * (high - low), step)  # short of the end, which leaves no range
        self.range["value"] = self.rng.choice(places[abs(places - present) > step])
        data = {"method": "update", "state": {"value": self.range["value"]}, "buffer_paths": []}
        took, begin = None, time.perf_counter()
        async for kind, content, buffers in self.say("comm_msg", comm_id=self.slider, data=data):
            if kind == "comm_msg" and content["comm_id"] == self.image and buffers:
                took = 1e3 * (time.perf_counter() - begin)
        if took is None:
            raise RuntimeError(f"{self.name} moved to {self.range['value']}, and no new picture came")
        return took

    async def play(self):
        """Milliseconds of each move, at a human pace."""
        times = []
        for _ in range(WARM_UP + MOVES):
            await asyncio.sleep(self.rng.uniform(*PAUSE))
            times.append(await self.move())
        return times[WARM_UP:]


async def together(hub, students, action):
    """Let all students do the same at once; gives the results, seconds until the last is done, processor seconds."""
    begin, spent = time.perf_counter(), hub.processor_seconds()
    done = await asyncio.gather(*map(action, students))
    return done, time.perf_counter() - begin, hub.processor_seconds() - spent


async def measure(sizes=SIZES):
    """A dict of figures for each size of the class, and {lesson: memory} of one student with lessons 01 to 03."""
    lessons = {path.name[:2]: path.name for path in NOTEBOOKS}
    with tempfile.TemporaryDirectory(prefix="qlab_hub_", ignore_cleanup_errors=True) as folder, \
            contextlib.closing(Hub(folder)) as hub:
        await hub.wait_until_up()
        students = [Student(hub, f"student{i}", seed=i) for i in range(max(sizes))]
        await hub.ask("hub/api/users", {"usernames": [student.name for student in students]})
        classes = []
        for size in sizes:
            present = students[:size]
            _, *start = await together(hub, present, Student.start)
            _, *run = await together(hub, present, lambda student: student.open(lessons["03"]))
            times, _, spent = await together(hub, present, Student.play)
            classes.append({"size": size, "times": np.ravel(times), "memory": hub.memory(), "start": start, "run": run,
                            "spent": spent})
            await asyncio.gather(*map(Student.stop, present))
        memory = {}
        await students[0].start()
        for number in ("01", "02", "03"):
            await students[0].open(lessons[number])
            memory[number] = hub.memory()
            await students[0].close()
        await students[0].stop()
    return classes, memory


def table(classes, memory):
    """Lines of text."""
    yield "            slider to picture, ms   MB per student, USS PSS   hub, proxy    start, and the lesson     move"
    yield "students     p50     p95    ratio     server       kernel       PSS MB     s  CPU s    s  CPU s    CPU ms"
    for row in classes:
        size, (start, start_cpu), (run, run_cpu) = row["size"], row["start"], row["run"]
        p50, p95 = np.percentile(row["times"], [50, 95])
        (server, server_pss), (kernel, kernel_pss) = row["memory"]["server"] / size, row["memory"]["kernel"] / size
        yield (f"{size:>8} {p50:7.1f} {p95:7.1f} {p95 / np.percentile(classes[0]['times'], 95):8.2f} "
               f"{server:6.0f} {server_pss:4.0f} {kernel:7.0f} {kernel_pss:4.0f} {row['memory']['hub'][1]:12.0f} "
               f"{start:7.0f} {start_cpu / size:5.1f} {run:5.0f} {run_cpu / size:6.1f} "
               f"{1e3 * row['spent'] / (WARM_UP + MOVES) / size:9.1f}")
    yield "CPU seconds are per student, CPU milliseconds per move, of all processes of the hub together."
    for number, of in memory.items():
        server, kernel = of["server"][0], of["kernel"][0]
        yield f"lesson {number}, one student: USS {server + kernel:.0f} MB, server {server:.0f} and kernel {kernel:.0f}"


def main():
    if not importlib.util.find_spec("jupyterhub") or not find_proxy():
        print("skipped: this needs the packages of the extra \"hub\" and configurable-http-proxy (npm), on the PATH or "
              "named in QLAB_PROXY")
        return
    sizes = tuple(map(int, sys.argv[1:])) or SIZES
    print(*table(*asyncio.run(measure(sizes))), sep="\n")


if __name__ == "__main__":
    main()
