"""The test bed: what it would run, and on machines that allow it a bed that really stands."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hexgen2.deploy.testbed import Bed, Wiring, bed, cores_of, records, require_means, sweep
from hexgen2.deploy.testbed.quotas import Controller, find_controller, members, move, pinned
from hexgen2.deploy.testbed.wiring import TokenBucket
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.cluster import Cluster, parse_cluster
from hexgen2.specs.errors import InputError
from tests.deploy import builders
from tests.waiting import HUNG_S

V1 = """\
tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0
"""


def three_nodes(**network: object) -> Cluster:
    return parse_cluster(
        {
            "name": "test",
            "nodes": [{"name": name, "gpu": "cpu-1c-4g", "count": 1} for name in "abc"],
            "network": {"default": {"gbps": 0.1}, **network},
        },
        "test",
    )


@pytest.fixture
def records_at(tmp_path: Path) -> Path:
    """A folder for the records of beds; skips where no bed can stand on this machine."""
    try:
        with Bed(builders.cluster(("a", "cpu-1c", 1), ("b", "cpu-1c", 1)), tmp_path):
            return tmp_path
    except InputError as error:  # no root, no tool, or a kernel that refuses: only building one shows the last
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("rate", "burst"), [(1e6, 2**16), (12.5e6, 2**16), (125e6, 500_000), (1.25e9, 5_000_000)]
)
def test_a_link_holds_a_tick_of_its_rate_and_a_whole_packet(rate: float, burst: int) -> None:
    bucket = TokenBucket(rate)
    assert bucket.burst_bytes == burst
    assert bucket.arguments[:3] == ("tbf", "rate", f"{rate * 8:.0f}bit")


def test_every_pair_of_nodes_has_its_own_link_at_the_clusters_rate_in_both_directions() -> None:
    wiring = Wiring(three_nodes(links=[{"between": ["a", "b"], "gbps": 0.05}]), "00ff")
    limits = {
        (command[2], command[6]): command[command.index("rate") + 1]
        for command in wiring.setup()
        if command[:2] == ("tc", "-netns") and command[6].startswith("to")
    }
    slow, usual = "50000000bit", "100000000bit"
    assert limits == {
        ("hx00ff-0", "to1"): slow,
        ("hx00ff-1", "to0"): slow,
        ("hx00ff-0", "to2"): usual,
        ("hx00ff-2", "to0"): usual,
        ("hx00ff-1", "to2"): usual,
        ("hx00ff-2", "to1"): usual,
    }
    routes = [command for command in wiring.setup() if "route" in command]
    assert len(routes) == 6
    assert (
        "ip",
        "-netns",
        "hx00ff-0",
        "route",
        "add",
        "198.18.255.2/32",
        "dev",
        "to1",
        "src",
        "198.18.255.1",
    ) in routes


@pytest.mark.parametrize(
    ("tag", "subnet"), [("0000", "198.18.0"), ("01fe", "198.19.254"), ("ff07", "198.19.7")]
)
def test_addresses_are_from_the_range_for_measurements(tag: str, subnet: str) -> None:
    wiring = Wiring(three_nodes(), tag)
    assert [node.host for node in wiring.hosted().nodes] == [f"{subnet}.{node}" for node in (1, 2, 3)]
    assert wiring.host_address == f"{subnet}.254"


def test_interface_names_are_short_enough_for_the_kernel() -> None:
    many = builders.cluster(*((f"n{place}", "cpu-1c", 1) for place in range(99)))
    wiring = Wiring(many, "abcd")
    assert max(map(len, (*wiring.cables(), wiring.bridge))) <= 15


@pytest.mark.parametrize("gbps", [None, 0.3])
def test_a_nodes_cable_has_the_rate_of_its_card_or_of_its_fastest_link(gbps: float | None) -> None:
    nodes = [{"name": name, "gpu": "cpu-1c", "count": 1} for name in "ab"]
    if gbps:
        nodes[0] = {**nodes[0], "nic_gbps": gbps}
    wiring = Wiring(builders.cluster(*nodes), "0000")
    assert wiring.uplink_rate(0) == pytest.approx((gbps or 10) / 8 * 1e9)


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        ([("a", "A100-80G-SXM", 1)], "is no CPU device"),
        ([(f"n{place}", "cpu-1c", 1) for place in range(100)], "at most 99"),
    ],
)
def test_clusters_that_cannot_be_a_bed_are_refused(nodes: list[tuple[str, str, int]], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Wiring(builders.cluster(*nodes), "0000")


def test_a_device_is_the_part_of_a_core_that_its_bandwidth_is() -> None:
    assert cores_of(gpu_type("cpu-1c")) == 1
    assert cores_of(gpu_type("cpu-1c-4g")) == pytest.approx(18 / 35)


@pytest.mark.parametrize(
    ("version", "membership", "group"),
    [
        (1, "3:cpuset:/\n2:cpu,cpuacct:/a/b\n0::/c\n", "a/b"),
        (2, "2:cpu:/a\n0::/c\n", "c"),
        (1, "0::/c\n", "."),
    ],
)
def test_a_processs_group_and_the_first_place_among_groups(
    version: int, membership: str, group: str, tmp_path: Path
) -> None:
    controller = Controller(1 if version == 1 else 2, tmp_path)
    assert controller.group_of(membership) == tmp_path / group
    controller.favour(tmp_path)
    name = {1: "cpu.shares", 2: "cpu.weight"}[version]
    assert int((tmp_path / name).read_text()) >= 10_000


@pytest.mark.parametrize(
    ("version", "cores", "files"),
    [
        (1, 0.25, {"cpu.cfs_period_us": "25000", "cpu.cfs_quota_us": "6250"}),
        (1, None, {"cpu.cfs_period_us": "25000", "cpu.cfs_quota_us": "-1"}),
        (2, 1.5, {"cpu.max": "37500 25000"}),
        (2, 0.01, {"cpu.max": "1000 25000"}),  # the kernel's least
        (2, None, {"cpu.max": "max 25000"}),
    ],
)
def test_a_quota_is_written_as_the_kernel_reads_it(
    version: int, cores: float | None, files: dict[str, str], tmp_path: Path
) -> None:
    controller = Controller(1 if version == 1 else 2, tmp_path)
    folder = controller.make("bed", "engine")
    assert folder == tmp_path / "bed" / "engine"
    controller.limit(folder, cores)
    assert {name: (folder / name).read_text() for name in files} == files


@pytest.mark.parametrize(
    ("parts", "cores"),
    [
        ((0.2, 0.7, 0.2, 0.2), (1, 0, 1, 1)),
        ((0.35, 0.35, 0.35, 0.35), (0, 1, 0, 1)),
        ((1.5, 0.4), (None, 0)),
    ],
)
def test_parts_of_cores_are_spread_over_two_cores(
    parts: tuple[float, ...], cores: tuple[int | None, ...]
) -> None:
    found = pinned({str(place): part for place, part in enumerate(parts)}, (0, 1))
    assert tuple(found.get(str(place)) for place in range(len(parts))) == cores


def test_the_controller_is_found_by_its_version(tmp_path: Path) -> None:
    assert find_controller(V1) == Controller(1, Path("/sys/fs/cgroup/cpu,cpuacct"))
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io\n")
    unified = f"cgroup2 {tmp_path} cgroup2 rw 0 0\n"
    assert find_controller(unified) == Controller(2, tmp_path)
    assert find_controller(V1 + unified) == Controller(1, Path("/sys/fs/cgroup/cpu,cpuacct"))
    (tmp_path / "cgroup.controllers").write_text("hugetlb\n")
    assert find_controller(unified) is None


def test_without_root_a_bed_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bed.os, "geteuid", lambda: 1000)
    with pytest.raises(InputError, match="needs root") as refused:
        require_means()
    assert "\n" not in str(refused.value)


def test_a_record_survives_its_file_and_is_abandoned_with_its_owner(tmp_path: Path) -> None:
    own = records.start_tick(os.getpid())
    assert own is not None
    made = records.Record(
        tag="00aa", pid=os.getpid(), started=own, interfaces=("hx00aabr",), namespaces=("hx00aa-0",), groups="g"
    )
    records.keep(made, tmp_path)
    (tmp_path / "other.json").write_text("{}")
    assert records.kept(tmp_path) == [made]
    assert not made.abandoned
    assert made.model_copy(update={"started": own - 1}).abandoned, "another process with the same number"
    assert made.removal() == [
        ("ip", "link", "delete", "hx00aabr"),
        ("ip", "netns", "delete", "hx00aa-0"),
    ]


@contextmanager
def receiving(bed: Bed, node: int, port: int) -> Iterator[None]:
    """A server in a node that takes what comes, and says when it has all of it."""
    script = (
        "import socket,sys\n"
        f"with socket.create_server((sys.argv[1], {port})) as server:\n"
        "    print('up', flush=True)\n"
        "    while True:\n"
        "        one, _ = server.accept()\n"
        "        while one.recv(1 << 16): pass\n"
        "        one.close()\n"
    )
    command = bed.inside(node, (sys.executable, "-c", script, bed.wiring.address(node)))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        try:
            yield
        finally:
            process.kill()


def left(tag: str) -> list[str]:
    """What is left of a bed on this machine."""
    spaces = subprocess.run(("ip", "netns", "list"), capture_output=True, text=True, check=True).stdout.split()
    links = os.listdir("/sys/class/net")
    groups = os.listdir(require_means().root)
    return [name for name in (*spaces, *links, *groups) if name.startswith(f"hx{tag}")]


def test_a_link_carries_its_rate_and_nothing_is_left_behind(records_at: Path) -> None:
    size, gbps = 2_500_000, 0.1
    send = (
        "import socket,sys,time\n"
        "with socket.create_connection((sys.argv[1], 7000)) as one:\n"
        "    begin = time.monotonic()\n"
        f"    one.sendall(bytes({size}))\n"
        "    one.shutdown(socket.SHUT_WR)\n"
        "    one.recv(1)\n"
        "    print(time.monotonic() - begin)\n"
    )
    before = Path("/proc/self/cgroup").read_text()
    with Bed(three_nodes(), records_at) as bed:
        tag = bed.wiring.tag
        assert left(tag)
        assert Path("/proc/self/cgroup").read_text() != before, "it is in a group that runs before others"
        with receiving(bed, 1, 7000):
            command = bed.inside(0, (sys.executable, "-c", send, bed.wiring.address(1)))
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
            with socket.create_connection((bed.wiring.address(1), 7000), timeout=HUNG_S):
                pass  # the machine itself reaches a node over the bridge
        # Never faster than the rate with a full bucket; how much slower, the machine's load decides.
        assert size / float(done.stdout) < 1.15 * gbps / 8 * 1e9
    assert left(tag) == []
    assert list(records_at.iterdir()) == []
    assert Path("/proc/self/cgroup").read_text() == before


def test_placed_processes_run_in_their_nodes(records_at: Path) -> None:
    devices = three_nodes()
    groups = [
        builders.group(f"c{place}", "colocated", ([f"{name}/0"], 8), share=1 / 3)
        for place, name in enumerate("abc")
    ]
    with Bed(devices, records_at) as bed:
        deployment = builders.compiled(builders.plan(bed.cluster, groups))
        placed = bed.place(deployment)
        first = placed.processes[1]
        command = first.argv[: first.argv.index("python")]
        where = subprocess.run(
            (*command, "sh", "-c", "ip -brief address show eth0; cat /proc/self/cgroup"),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert bed.wiring.address(1) + "/24" in where
        assert f"/hx{bed.wiring.tag}/c1" in where
        assert first.env["UCX_NET_DEVICES"] == "to0,to2"
        assert first.host == bed.wiring.address(1)


SERVER_AND_CORE = """
import os, time
from pathlib import Path
if os.fork() == 0:
    Path("/proc/self/comm").write_text("VLLM::EngineCore")
os.write(1, f"{os.getpid()}\\n".encode())  # whole: both write at once
time.sleep(600)
"""


@contextmanager
def killed(process: subprocess.Popen[str]) -> Iterator[None]:
    """However the block ends: else leaving the process would wait for its own end."""
    try:
        yield
    finally:
        process.kill()


def test_what_computes_is_limited_and_the_rest_of_an_engine_is_not(records_at: Path) -> None:
    with Bed(three_nodes(), records_at) as bed:
        groups = [builders.group("c0", "colocated", (["a/0"], 8))]
        (process,) = bed.place(builders.compiled(builders.plan(bed.cluster, groups))).processes
        engine = require_means().root / f"hx{bed.wiring.tag}" / "c0"
        device = engine.with_name("c0-device")

        def quota(group: Path) -> list[str]:
            return [(group / name).read_text() for name in require_means().settings(None)]

        command = (*process.argv[: process.argv.index("python")], sys.executable, "-c", SERVER_AND_CORE)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, killed(server):
            assert server.stdout is not None
            pids = {int(server.stdout.readline()) for _ in range(2)}
            assert set(members(engine)) == pids
            for _ in range(2):  # the second time there is nothing to move
                bed.limit()
                assert members(engine) == [server.pid]
                assert members(device) == list(pids - {server.pid})
            assert quota(device) != quota(engine)
            assert len(os.sched_getaffinity(members(device)[0])) == 1
            assert os.sched_getaffinity(server.pid) == os.sched_getaffinity(0)
            os.kill(members(device)[0], signal.SIGKILL)
            deadline = time.monotonic() + 10
            while members(device):
                assert time.monotonic() < deadline, "a killed process does not go"
                time.sleep(0.02)
            with pytest.raises(RuntimeError, match="nothing to limit"):
                bed.limit()


def test_a_bed_whose_owner_was_killed_is_swept_with_what_ran_in_it(records_at: Path) -> None:
    script = (
        "import subprocess,sys,time\n"
        "from pathlib import Path\n"
        "from hexgen2.deploy.testbed import Bed\n"
        "from tests.deploy.test_testbed import three_nodes\n"
        "with Bed(three_nodes(), Path(sys.argv[1])) as bed:\n"
        "    orphan = subprocess.Popen(bed.inside(2, ('sleep', '600')))\n"
        "    print(bed.wiring.tag, orphan.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        (sys.executable, "-c", script, str(records_at)),
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((f"{root}/src", root))},
    ) as owner:
        assert owner.stdout is not None
        tag, orphan = owner.stdout.readline().split()
        assert sweep(records_at) == [], "its owner lives"
        owner.send_signal(signal.SIGKILL)
    assert left(tag)
    assert sweep(records_at) == [tag]
    assert left(tag) == []
    deadline = time.monotonic() + HUNG_S
    while records.start_tick(int(orphan)) is not None and _state(int(orphan)) != "Z":
        assert time.monotonic() < deadline, "what ran in it still runs"
        time.sleep(0.02)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_group_that_takes_nobody_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cgroup\.procs: cannot be set to '1'"):
        move([1], tmp_path / "nowhere")


def test_a_process_that_has_ended_is_no_matter() -> None:
    controller = find_controller(Path("/proc/mounts").read_text())
    if controller is None or os.geteuid() != 0:
        pytest.skip("needs root and a controller for the processor")
    with subprocess.Popen(("true",)) as ended:
        pass
    move([ended.pid], controller.root)
