"""A job on a Ray cluster: tasks read the files, actors with an engine each write the shards. Needs the extra `ray`.

Ray Data schedules, transports and retries. A row of its data set is a whole shard, so that no block can tear one apart.
Who has translated a shard writes it, with its record, before Ray hears of it: shards are the only state, and they
survive the driver, which Ray's own progress does not.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import pickle
import queue
import secrets
import shutil
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from kvx.runtime.backends.registry import place
from kvx.runtime.bundle.folder import CHECKPOINT_FILE, Bundle
from kvx.runtime.bundle.manifest import MANIFEST_FILE
from kvx.runtime.cluster import Room, answers, hushed, no_cluster, reachable, size_in_words
from kvx.runtime.engine.core import Core, EngineOptions
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.translating import translate_each
from kvx.runtime.errors import BundleError, DeviceError, KvxError, OptionError
from kvx.runtime.rules import Option, count, flag, refuse, text, wrong_values
from kvx.runtime.scale.batch import Progress, Shards, Summary, Told, conclude
from kvx.runtime.scale.folder import OutputFolder, ShardRecord, whole_shards
from kvx.runtime.scale.inputs import InputFile
from kvx.runtime.scale.job import Job, bundle_digest
from kvx.runtime.scale.packages import package
from kvx.runtime.system import available_threads

NEEDS = "jobs on Ray"
OWN_STORE = 256 * 2**20  # bytes for shards on their way, where Ray is started for the job; by default it is gigabytes
READING_TASKS = 2
WATCH_SECONDS = 5.0
HEAD_SECONDS = 20.0  # Ray ends the process after 60 without its head
STILL_SECONDS = 30.0  # without a shard, after which the room for workers is looked at
QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # it tells as errors what Ray Data always does
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leaves devices alone, and does not warn of it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # threads of Ray Data that a job has left behind would start another Ray
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}

_log = logging.getLogger("kvx")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """What a job takes of a Ray cluster. Raises OptionError."""

    address: Annotated[
        str | None,
        Option(
            text(),
            "With --engine ray: the cluster, as HOST:PORT of its head, or auto for the one that this machine is in.",
            unset="a Ray that is started for the job, on this machine",
        ),
    ] = None
    cpus_per_worker: Annotated[
        int, Option(count(4096), "With --engine ray: logical CPUs of each worker, which are its threads.")
    ] = 1
    devices_per_worker: Annotated[int, Option(count(64, least=0), "With --engine ray: GPUs of each worker.")] = 0
    ship: Annotated[
        bool,
        Option(
            flag(),
            "With --engine ray: send the bundle to the nodes. Otherwise each has it at the same path.",
        ),
    ] = False

    def __post_init__(self) -> None:
        refuse(wrong_values(self))


def run_on_ray(
    job: Job,
    bundle: Bundle,
    folder: OutputFolder,
    cluster: ClusterOptions,
    *,
    workers: int | None = None,
    told: Told | None = None,
) -> Summary:
    """Translates what is missing in the folder, which all nodes have at the same path, as they have the input.

    `workers`: engines in the cluster, by default as many as it has room for. Raises OptionError where Ray is not
    installed or the cluster lacks room, DeviceError where none answers, and what `run_batch` raises.
    """
    before, started = sum(one.rows for one in folder.records.values()), time.perf_counter()
    with _connected(cluster, workers) as ray:
        count = _workers_for(Room.of(ray), cluster, workers)
        rows = errors = 0
        for record in _watched(ray, _records(ray, job, bundle, folder, cluster, count), cluster):
            folder.records[record.key] = record
            rows, errors = rows + record.rows, errors + record.errors
            if told is not None:
                told(Progress(rows, errors, 0, 0))
    return conclude(folder, before, time.perf_counter() - started)


def _records(
    ray: Any,  # noqa: ANN401  # the module, which has no types
    job: Job,
    bundle: Bundle,
    folder: OutputFolder,
    cluster: ClusterOptions,
    workers: int,
) -> Iterator[ShardRecord]:
    """The record of each shard as it is written. Raises what workers raise of kvx's own."""
    data = package("ray.data", NEEDS)
    context = data.DataContext.get_current()
    context.target_max_block_size = 1  # every shard is a block as soon as it is read
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    source = _BundleSource.of(ray, bundle, ship=cluster.ship)
    arguments = (job, source, folder.path.absolute(), cluster.cpus_per_worker, cluster.devices_per_worker)
    files = sum(whole_shards(file.number, folder.records) is not None for file in job.inputs)
    shards = data.read_datasource(
        _datasource(job, folder),
        num_cpus=0,
        concurrency=min(READING_TASKS, files),
        override_num_blocks=files,
    ).map_batches(
        ShardWorker,
        batch_size=1,
        batch_format="pyarrow",
        compute=data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        fn_constructor_args=arguments,
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.devices_per_worker or None,
    )
    _keep_to_files(logging.getLogger("ray.data"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there may be fewer files or shards than workers
        for row in shards.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])  # of our own workers
            yield ShardRecord.of(json.loads(row["record"]))


def _watched(ray: Any, records: Iterator[ShardRecord], cluster: ClusterOptions) -> Iterator[ShardRecord]:  # noqa: ANN401
    """The records as they come. Raises DeviceError when the head of the cluster is lost or Ray has given up.

    A thread of its own waits for Ray. Where the head is lost, Ray says nothing, and ends the process after a minute.
    """
    finished = queue.SimpleQueue[ShardRecord | BaseException | None]()
    threading.Thread(target=_hand_over, args=(records, finished), name="kvx-ray", daemon=True).start()
    watch = _Watch(ray, cluster)
    while True:
        watch.check()
        try:
            one = finished.get(timeout=WATCH_SECONDS)
        except queue.Empty:
            continue
        if one is None:
            return
        if isinstance(one, BaseException):
            watch.explain(one)
            raise one
        watch.shard_came()
        yield one


class _Watch:
    """What becomes of the cluster while it works."""

    def __init__(self, ray: Any, cluster: ClusterOptions) -> None:  # noqa: ANN401
        self._ray, self._cluster = ray, cluster
        self._head = ray.get_runtime_context().gcs_address
        self._checked = self._answered = self._still_since = time.monotonic()

    def shard_came(self) -> None:
        """A shard is finished."""
        self._still_since = time.monotonic()

    def explain(self, error: BaseException) -> None:
        """Raises an error of kvx for one that comes from Ray, if there is one."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, KvxError):  # what a task has raised
            raise cause from None
        if isinstance(error, Exception) and not isinstance(error, KvxError):
            if not answers(self._head):
                raise _head_lost(self._head) from error
            if isinstance(error, self._ray.exceptions.RayError):
                what = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
                raise DeviceError(
                    f"Ray has given the job up ({' '.join(what.split()):.300})",
                    expected="a cluster that can run the job to its end",
                    remedy="Whole shards stay. Look into Ray's logs, and give the same command again.",
                ) from error

    def check(self) -> None:
        """Now and then: warns where workers have lost their room, for which Ray waits without a word. Raises
        DeviceError where the head is lost.
        """
        now = time.monotonic()
        if now - self._checked < WATCH_SECONDS:
            return
        self._checked = now
        if answers(self._head):
            self._answered = now
        elif now - self._answered > HEAD_SECONDS:
            raise _head_lost(self._head)
        if self._answered == now and now - self._still_since > STILL_SECONDS:
            self._still_since = now
            room = Room.of(self._ray)
            if not room.holds(self._cluster.cpus_per_worker, self._cluster.devices_per_worker):
                _log.warning("the Ray cluster has only %s: the job waits for nodes with room for its workers", room)


def _hand_over(records: Iterator[ShardRecord], found: queue.SimpleQueue[ShardRecord | BaseException | None]) -> None:
    """Puts what comes into the queue, and at the end None or what was raised."""
    try:
        for one in records:
            found.put(one)
    except BaseException as error:  # of any kind: whoever waits has to hear of it
        found.put(error)
    else:
        found.put(None)


class HeadLostError(DeviceError):
    """The head of the cluster does not answer any more. Ray may break the process when it ends."""


def _head_lost(head: str) -> HeadLostError:
    return HeadLostError(
        f"The head of the Ray cluster, {head}, does not answer any more",
        expected="a head that lives as long as the job",
        remedy="Whole shards stay. Give the same command again when there is a cluster, or with `engine` local.",
        option="address",
    )


def _keep_to_files(log: logging.Logger) -> None:
    """What Ray Data logs stays in its files. What goes wrong is raised, too."""
    for handler in log.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL + 1)


class ShardWorker:
    """An actor: one engine, which translates a shard at a time and writes it."""

    def __init__(self, job: Job, source: _BundleSource, output: Path, cpus: int, devices: int) -> None:
        self._job = job
        self._output = output
        self._options = job.translate.changed(rows=None, workers=None, cache_bytes=None)
        self._failure: KvxError | None = None
        try:
            self._reader = job.reader
            self._core = self._load(source.here(), cpus, devices)
        except KvxError as error:  # Ray would start another, and again
            self._failure = error

    def __call__(self, batch: Any) -> dict[str, Any]:  # noqa: ANN401  # an Arrow table
        """A shard as it was read → its record as JSON, or the error of kvx that ends the job, pickled."""
        record, error = "", b""
        try:
            if self._failure is not None:
                raise self._failure
            [row] = batch.to_pylist()
            record = self._written(row).to_json()
        except KvxError as found:
            error = pickle.dumps(found)
        return {"record": np.array([record], dtype=object), "error": np.array([error], dtype=object)}

    def _written(self, row: Mapping[str, Any]) -> ShardRecord:
        folder = OutputFolder(self._output, {}, {})
        rows = list(self._reader.rows_of(self._job.inputs[row["file"]], row["shard"], row["piece"]))
        with contextlib.closing(Shards(self._job, folder)) as shards:
            results = translate_each(self._core, [one.asked for one in rows], self._options)
            for one, result in zip(rows, results, strict=True):
                shards.write(one, result)
            shards.finish(last=row["last"])
        [record] = folder.records.values()
        return record

    def _load(self, bundle: Bundle, cpus: int, devices: int) -> Core:
        device = ",".join(f"cuda:{number}" for number in range(devices)) or "cpu"
        placed = place(bundle, "onnx", device)
        model = LoadedModel.load(bundle, threads=cpus, workers=None if devices else cpus, devices=placed)
        asked = self._job.translate
        sizes = EngineOptions(rows=asked.rows, cache_bytes=asked.cache_bytes)
        return Core(model, sizes, sized_for=asked.changed(workers=None))


@dataclass(frozen=True, slots=True)
class _BundleSource:
    """Where a worker gets the bundle from: a path, or the files in Ray's object store, by name."""

    path: Path
    digest: str
    files: Mapping[str, Any] | None

    @classmethod
    def of(cls, ray: Any, bundle: Bundle, *, ship: bool) -> _BundleSource:  # noqa: ANN401
        """Of the driver's bundle. To `ship`, what ONNX Runtime needs of it is put into the object store."""
        files = None
        if ship:
            names = [name for name in bundle.manifest.files if not name.endswith(".ts") and name != CHECKPOINT_FILE]
            bundle.check_hashes(names)
            files = {
                name: ray.put(np.fromfile(bundle.folder / name, dtype=np.uint8)) for name in (MANIFEST_FILE, *names)
            }
        return cls(bundle.folder.absolute(), bundle_digest(bundle.manifest), files)

    def here(self) -> Bundle:
        """The bundle on this node, with the driver's hashes. Raises BundleError."""
        if self.files is None:
            return self._checked(self.path)
        folder = Path(tempfile.gettempdir()) / f"kvx-bundles-{os.getuid()}" / self.digest
        if not folder.is_dir():
            self._unpack(folder)
        bundle = self._checked(folder)
        bundle.check_hashes()
        return bundle

    def _checked(self, folder: Path) -> Bundle:
        try:
            bundle = Bundle.open(folder)
        except BundleError as error:
            raise self._not_here(folder, f"cannot be used ({error.got})") from error
        if bundle_digest(bundle.manifest) != self.digest:
            raise self._not_here(folder, "is not the one that the job was started with")
        return bundle

    def _not_here(self, folder: Path, what: str) -> BundleError:
        return BundleError(
            f"The bundle {folder} on {socket.gethostname()} {what}",
            expected="the same bundle on every node",
            remedy="Copy it there, or send it with `ship`.",
        )

    def _unpack(self, folder: Path) -> None:
        """Writes the files to this node, once for all of its workers."""
        ray = package("ray", NEEDS)
        partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        partial.mkdir(mode=0o700, parents=True)
        try:
            for name, reference in (self.files or {}).items():
                ray.get(reference).tofile(partial / name)
            with contextlib.suppress(OSError):  # another worker was first
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _datasource(job: Job, folder: OutputFolder) -> Any:  # noqa: ANN401
    """The shards that are missing, as a source of Ray Data with a task for each file."""
    datasource, block = package("ray.data.datasource", NEEDS), package("ray.data.block", NEEDS)
    tasks = []
    for file in job.inputs:
        skipped = whole_shards(file.number, folder.records)
        if skipped is not None:
            reading = _Reading(job, replace(file, path=file.path.absolute()), frozenset(skipped))
            unknown = block.BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            tasks.append(datasource.ReadTask(reading, unknown))

    class Missing(datasource.Datasource):  # type: ignore[misc,name-defined]  # the module has no types
        def estimate_inmemory_data_size(self) -> None:
            """Not known."""

        def get_read_tasks(self, *_: object, **__: object) -> list[Any]:
            return tasks

    return Missing()


@dataclass(frozen=True, slots=True)
class _Reading:
    """Reads a file → a table of one row for each shard that is missing."""

    job: Job
    file: InputFile
    skipped: frozenset[int]

    def __call__(self) -> Iterator[Any]:
        """See above. A shard is held back until it is known whether it is the last."""
        pieces, held = self.job.reader.pieces(self.file, self.skipped), None
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                if held is not None:
                    yield self._table(*held, last=(held[0] + 1) * self.job.options.shard_rows >= end.value)
                return
            if held is not None:
                yield self._table(*held, last=False)
            held = piece

    def _table(self, shard: int, piece: bytes, *, last: bool) -> Any:  # noqa: ANN401
        arrow = package("pyarrow", NEEDS)
        kept = arrow.array([piece], type=arrow.large_binary())
        return arrow.table({"file": [self.file.number], "shard": [shard], "last": [last], "piece": kept})


def _workers_for(room: Room, cluster: ClusterOptions, asked: int | None) -> int:
    """How many workers there will be. Raises OptionError where Ray would wait for room without a word."""
    cpus, gpus = cluster.cpus_per_worker, cluster.devices_per_worker
    fitting = room.holds_now(cpus, gpus)
    if not fitting or (asked or 0) > fitting:
        raise OptionError(
            f"The Ray cluster has {room}: room for {fitting} workers with {size_in_words(cpus, gpus)} each",
            expected=f"room for {asked or 1}",
            remedy="Use fewer `workers`, fewer `cpus_per_worker` or `devices_per_worker`, add nodes, or start these "
            "with more logical CPUs (ray start --num-cpus).",
            option="workers",
        )
    return asked or fitting


@contextlib.contextmanager
def _connected(cluster: ClusterOptions, workers: int | None) -> Iterator[Any]:
    """The module ray, connected to the cluster, or to one that is started for the job. Raises DeviceError."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    ray = package("ray", NEEDS)
    if cluster.address is None:
        cpus = available_threads()
        if not cluster.devices_per_worker:
            _workers_for(Room.alone(cpus), cluster, workers)  # before Ray takes its seconds to start
        where = {"address": "local", "num_cpus": cpus, "include_dashboard": False, "object_store_memory": OWN_STORE}
    else:
        where = {"address": cluster.address if cluster.address == "auto" else reachable(ray, cluster.address)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with hushed():
                ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise no_cluster(cluster.address or "this machine", error) from None
    try:
        yield ray
    except HeadLostError:
        atexit.unregister(ray.shutdown)  # which may end the process before anybody hears why
        raise
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()
