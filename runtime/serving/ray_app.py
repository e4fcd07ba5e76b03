"""The service as a Ray Serve deployment, one engine of each bundle in a replica:

    serve run kvx.runtime.serving.ray_app:app bundles=artifacts/de-en,artifacts/nllb

Serve starts replicas, and routes requests to them. All answers are those of `kvx serve`. It needs the packages of the
extras `serve` and `ray`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Receive, Scope, Send

from kvx.runtime.backends.graphs import THREADS
from kvx.runtime.backends.registry import place
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.cluster import Room, no_cluster, reachable, size_in_words
from kvx.runtime.engine.core import EngineOptions
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.errors import DeviceError
from kvx.runtime.options import OPTIONS
from kvx.runtime.rules import Option, Problem, choice, count, described, refuse, wrong_values
from kvx.runtime.serving.app import application
from kvx.runtime.serving.arguments import check_known, options_of, spellings
from kvx.runtime.serving.exchange import WHEN_GONE
from kvx.runtime.serving.keys import Keys
from kvx.runtime.serving.models import Model, Place, check_places, load_models, places_of
from kvx.runtime.serving.service import Service, engine_options
from kvx.runtime.serving.settings import TEXTS, ServeOptions
from kvx.runtime.system import available_threads
from kvx.runtime.translator import Translator

NAME = "kvx"
OF_SERVE = ("host", "port", "proxies", "connections")  # options of `kvx serve` for what Ray Serve does here
RETRY_SECONDS = 1.0  # after which a client that was refused may come back
TARGET_SHARE = 0.5  # of the requests that a replica works on at a time: with more than that, replicas are added
MIDDLEWARE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # where Serve's HTTP proxies look for it
MIDDLEWARES = "kvx.runtime.serving.ray_proxy:middlewares"
GPU = {"cpu": 0, "cuda": 1}

_log = logging.getLogger("kvx")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions:
    """The replicas of a deployment, and what each of them runs on. Raises OptionError."""

    bundles: Annotated[
        tuple[str, ...],
        Option(TEXTS, "Bundles, or folders of bundles, as `kvx serve` takes them. Every node needs them at this path."),
    ] = ()
    replicas: Annotated[int, Option(count(10_000), "Replicas, or the fewest where `most_replicas` is given.")] = 1
    most_replicas: Annotated[
        int | None, Option(count(10_000), "Up to this number of replicas, by load.", unset="as many as `replicas`")
    ] = None
    device: Annotated[
        str, Option(choice(tuple(GPU)), "What each replica runs on: cpu, or cuda, which is one GPU for itself.")
    ] = "cpu"
    threads: Annotated[
        int | None,
        Option(
            THREADS,
            "Compute threads of each replica. It takes as many of Ray's logical CPUs.",
            unset="the cores of this machine, shared by all replicas",
        ),
    ] = None
    rows: Annotated[int | None, described(EngineOptions)["rows"]] = None
    cache_bytes: Annotated[int | None, OPTIONS["cache_bytes"]] = None

    def __post_init__(self) -> None:
        refuse([*wrong_values(self), *self._contradictions()])

    def _contradictions(self) -> Iterator[Problem]:
        if not self.bundles:
            yield Problem("bundles", "No `bundles` are named", "bundles, as in bundles=artifacts/de-en")
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            got = f"`most_replicas` is {self.most_replicas} and `replicas` {self.replicas}"
            yield Problem("most_replicas", got, "`most_replicas` that are not fewer than `replicas`")

    @property
    def cpus(self) -> int:
        """The threads and logical CPUs of a replica."""
        return self.threads or max(1, available_threads() // (self.most_replicas or self.replicas))


def app(arguments: dict[str, Any]) -> Application:
    """The application that `serve run` and `serve deploy` start. `arguments` are the options of `kvx serve` and of
    ReplicaOptions; those that are missing are read from the environment, as KVX_REQUESTS.

    Raises OptionError, BundleError and InputError for what cannot be served, DeviceError where Ray has no room for it.
    """
    known = spellings(ServeOptions, but=OF_SERVE) | spellings(ReplicaOptions)
    check_known(arguments, known)
    service = options_of(ServeOptions, arguments, os.environ, but=OF_SERVE)
    replicas = options_of(ReplicaOptions, arguments, os.environ)
    replicas = replace(replicas, threads=replicas.cpus)
    if (keys := service.keys) is not None:
        Keys.read(keys)
        service = replace(service, keys=keys.absolute())
    places = [replace(one, folder=one.folder.absolute()) for one in places_of(replicas.bundles)]
    check_places(places)
    check_room(replicas)
    return deployed(service, replicas, partial(load, service, replicas, places))


def deployed(service: ServeOptions, replicas: ReplicaOptions, load: Callable[[], list[Model]]) -> Application:
    """The application of a service, whose replicas get their models from `load`."""
    if replicas.most_replicas is None:
        size: dict[str, Any] = {"num_replicas": replicas.replicas}
    else:
        target = max(1.0, TARGET_SHARE * service.requests)
        bounds = {"min_replicas": replicas.replicas, "max_replicas": replicas.most_replicas}
        size = {"autoscaling_config": AutoscalingConfig(target_ongoing_requests=target, **bounds)}
    kind = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": GPU[replicas.device]},
        max_ongoing_requests=service.requests,
        max_queued_requests=service.waiting,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_SECONDS),
        graceful_shutdown_timeout_s=service.grace,
        logging_config=LoggingConfig(enable_access_log=False),  # the service has its own
        **size,
    )
    bound: Application = kind.bind(service, load)
    return bound


def load(service: ServeOptions, replicas: ReplicaOptions, places: Sequence[Place]) -> list[Model]:
    """The bundles in the memory of a replica, ready for every request. Raises what load_models raises."""
    size = engine_options(service, rows=replicas.rows, cache_bytes=replicas.cache_bytes)
    workers = replicas.cpus if replicas.device == "cpu" else None  # of one thread each

    def one(bundle: Bundle) -> Translator:
        devices = place(bundle, "onnx", replicas.device)
        model = LoadedModel.load(bundle, threads=replicas.cpus, workers=workers, devices=devices)
        translator = Translator(model, size)
        translator.engine.warm()
        return translator

    return load_models(places, one)


class Replica:
    """One service, in the event loop that Serve has for it."""

    def __init__(self, options: ServeOptions, load: Callable[[], list[Model]]) -> None:
        self._service = Service(options, load(), None if options.keys is None else Keys.read(options.keys))
        self._service.detector.load()

    def __serve_build_asgi_app__(self) -> ASGIApp:  # Serve's name
        """What answers, for Serve."""
        return Served(self._service)

    async def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica that fails three times. Raises DeviceError."""
        if not await self._service.is_ready():
            raise DeviceError(
                "An engine takes no steps",
                expected="a step within two seconds",
                remedy="Look for its errors in the log of the replica.",
            )


class Served:
    """The application of a service as Serve calls it: with a beginning, an end, and cancelled tasks where `kvx serve`
    is told by its connections that a client has gone away.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._application = application(service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or lives from the first to the last."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        answering = asyncio.ensure_future(self._application(scope, receive, send))
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:
            if (when_gone := state.get(WHEN_GONE)) is not None:
                when_gone(False)
            else:
                answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answering
            raise

    async def _live(self, receive: Receive, send: Send) -> None:
        service = self._service
        await receive()
        with service.journal:
            await send({"type": "lifespan.startup.complete"})
            await receive()
            service.admission.close()
            await asyncio.to_thread(service.models.close, drain=False)
            service.calls.shutdown(wait=False, cancel_futures=True)
        await send({"type": "lifespan.shutdown.complete"})


def check_room(replicas: ReplicaOptions) -> None:
    """Raises DeviceError where Ray's nodes have no room for the replicas: Ray would wait for it without end, and
    without an error.
    """
    cpus, gpus, room = replicas.cpus, GPU[replicas.device], _room()
    there = room.holds(cpus, gpus)
    if there < replicas.replicas:
        raise DeviceError(
            f"{replicas.replicas} replicas need {size_in_words(cpus, gpus)} each, and Ray has {room}: room for {there}",
            expected="nodes with room for all replicas",
            remedy="Ask for fewer `replicas` or `threads`, or add nodes.",
            option="threads",
        )
    if there < (replicas.most_replicas or 0):
        _log.warning("there is room for %d of up to %d replicas", there, replicas.most_replicas)
    if room.holds_now(cpus, gpus) < replicas.replicas:
        _log.warning("Ray has %s: replicas wait until others give theirs back", room)


def _room() -> Room:
    """That of the cluster which the application will run on. Where none runs, Serve will start one here: what that one
    will have. Raises DeviceError and OptionError.
    """
    if ray.is_initialized():
        return Room.of(ray)
    address = _address()
    if address is not None:
        reachable(ray, address, clients=True)
    try:
        ray.init(address or "auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        if address is not None:
            raise no_cluster(address, error) from error
        os.environ.setdefault(MIDDLEWARE, MIDDLEWARES)
        return Room.alone(available_threads())
    try:
        return Room.of(ray)
    finally:
        ray.shutdown()


def _address() -> str | None:
    """The cluster that `serve run` was told to use; None where it was told none."""
    import click  # which is Ray's own command line

    context = click.get_current_context(silent=True)
    told = context.params.get("address") if context is not None else os.environ.get("RAY_ADDRESS")
    return None if told in (None, "", "auto", "local") else str(told)
