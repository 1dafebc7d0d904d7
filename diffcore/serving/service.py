"""The service that batches requests continuously: each call of the network has a fixed number of
rows, filled with the evaluations that the samples of any requests wait for.

A sample takes its step as soon as its own evaluations are done, so that no request waits for slower
ones, and the next sample begins in its place. Samples begin in turn, one of each request, so that a
large request does not block the small ones behind it.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Self

import torch

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.prediction import Prediction
from diffcore.guidance import find_networks
from diffcore.sampling.generation import Samples
from diffcore.sampling.loop import evaluation_mode
from diffcore.serving.batch import Row, evaluate_rows, pending_rows
from diffcore.serving.counters import Outcome, ServiceCounters
from diffcore.serving.job import Job
from diffcore.serving.request import (
    QueueFullError,
    SamplingLimits,
    SamplingRequest,
    plan_request,
)
from diffcore.serving.trajectory import Trajectory

__all__ = ["SamplingService"]


class SamplingService:
    """Draws the samples of many requests with shared evaluations of one network.

    The samples of a request have the same bits whatever other requests are served, because the
    noise is keyed by the seeds and the network is always evaluated on `rows` rows. They agree with
    those of `diffcore.sample` to rounding.

    A thread works while the service is entered as a context manager. Without it, `work` evaluates
    one batch. All methods may be called from any thread.

    Args:
        denoiser: network with its process; its mode is that of evaluation during each call.
        rows: number of rows of each call of the network; with guidance each sample has several
            rows. The last bits of the samples depend on it.
        limits: bounds on requests.
        dtype: dtype of the samples during integration.

    Raises:
        ValueError: there is no row.

    Example:
        with SamplingService(Run("runs/digits").denoiser(), rows=32) as service:
            future = service.submit(SamplingRequest(seeds=[1, 2], condition=[3, 3]))
            images = future.result().x
    """

    def __init__(
        self,
        denoiser: DenoiserProtocol,
        rows: int = 32,
        limits: SamplingLimits = SamplingLimits(),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows is {rows}, expected at least 1")
        self.denoiser, self.rows, self.limits, self.dtype = denoiser, rows, limits, dtype
        self.counters = ServiceCounters()
        self._changed = threading.Condition()
        """Held for access to the jobs; notified of a new job and of the end."""
        self._jobs: dict[Job, None] = {}
        self._turns: deque[Job] = deque()
        """Jobs of which samples have not begun, in the order in which the next ones begin."""
        self._is_closed = False
        self._working = threading.Lock()
        """Held for access to the samples in progress, by one thread at a time."""
        self._active: dict[Trajectory, tuple[Job, int]] = {}
        self._pending: deque[Row] = deque()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._serve, name="diffcore service", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        """Whether a thread works on the requests."""
        return self._thread is not None and self._thread.is_alive() and not self._is_closed

    @property
    def gauges(self) -> dict[str, int]:
        """The present number of unfinished and of active samples."""
        with self._changed:
            return {"unfinished_samples": self._unfinished, "active_samples": len(self._active)}

    @property
    def _unfinished(self) -> int:
        return sum(job.remaining for job in self._jobs)

    def submit(self, request: SamplingRequest, timeout: float | None = None) -> Future[Samples]:
        """Accept a request.

        Args:
            request: the request.
            timeout: seconds after which it is given up with a TimeoutError; None: never.

        Returns:
            The future samples, on the host. Its method `cancel` ends the request at any time
            before it is done.

        Raises:
            ValueError: the request exceeds a limit, or its arguments do not fit together.
            QueueFullError: there are too many unfinished samples.
            RuntimeError: the service is closed.
        """
        try:
            job = Job(plan_request(self.denoiser.process, request, self.limits), timeout)
            with self._changed:
                self._check_capacity(job.count)
                self._jobs[job] = None
                self._turns.append(job)
                self._changed.notify()
        except Exception:
            self.counters.count_request("refused")
            raise
        return job.future

    def _check_capacity(self, count: int) -> None:
        if self._is_closed:
            raise RuntimeError("the service is closed: it accepts no requests")
        if self._unfinished + count > self.limits.queue:
            raise QueueFullError(
                f"{self._unfinished} samples are unfinished and {count} were requested, but at "
                f"most {self.limits.queue} are accepted: send the request again later"
            )

    def close(self) -> None:
        """Cancel the unfinished requests, and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        with self._working:
            for job in list(self._jobs):
                job.future.cancel()
                self._end(job, "cancelled")

    def work(self) -> bool:
        """Evaluate one batch, and advance the samples whose evaluations are done.

        Returns:
            Whether there was anything to evaluate.
        """
        with self._working, torch.no_grad():
            self._drop_jobs()
            self._begin_samples()
            rows = self._take_rows()
            if rows:
                self._evaluate(rows)
            return bool(rows)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                if self._is_closed:
                    return
            self.work()

    def _drop_jobs(self) -> None:
        """End the requests that were cancelled, or whose time is over."""
        with self._changed:
            jobs = list(self._jobs)
        for job in jobs:
            if job.future.cancelled():
                self._end(job, "cancelled")
            elif job.is_late:
                job.fail(TimeoutError(f"the request was not done within {job.timeout:g} seconds"))
                self._end(job, "timed_out")

    def _begin_samples(self) -> None:
        """Begin samples, one of each request in turn, until the pending rows fill a batch."""
        while len(self._pending) < self.rows:
            with self._changed:
                if not self._turns:
                    return
                job = self._turns.popleft()
                index, job.begun = job.begun, job.begun + 1
                if job.begun < job.count:
                    self._turns.append(job)
            try:
                trajectory = Trajectory(self.denoiser, job.plan, index, self.dtype)
            except Exception as error:
                self._fail(job, error)
            else:
                self._active[trajectory] = (job, index)
                self._pending += pending_rows(trajectory)

    def _take_rows(self) -> list[Row]:
        """Take the oldest rows, at most `rows` of them, which belong to one network."""
        taken: list[Row] = []
        others: list[Row] = []
        while self._pending and len(taken) < self.rows:
            row = self._pending.popleft()
            is_other = taken and row.query.denoiser != taken[0].query.denoiser
            (others if is_other else taken).append(row)
        self._pending.extendleft(reversed(others))
        return taken

    def _evaluate(self, rows: Sequence[Row]) -> None:
        """Evaluate rows; an error of the network ends all requests that they belong to."""
        jobs = {row.trajectory: self._active[row.trajectory][0] for row in rows}
        rules = {job.plan.request.guidance for job in jobs.values()}
        networks = [network for rule in rules for network in find_networks(rule)]
        try:
            with evaluation_mode(self.denoiser, *networks):
                predictions = evaluate_rows(rows, self.rows)
        except Exception as error:
            for job in set(jobs.values()):
                self._fail(job, error)
            return
        self.counters.count_batch(len(rows), self.rows)
        for row, prediction in zip(rows, predictions, strict=True):
            if row.trajectory in self._active:  # its request may have failed in this loop
                self._receive(row, prediction)

    def _receive(self, row: Row, prediction: Prediction) -> None:
        """Give a prediction to its sample, which may take a step or be done then."""
        trajectory = row.trajectory
        job, index = self._active[trajectory]
        try:
            if not trajectory.receive(row.index, prediction):
                return
            if not trajectory.is_done:
                self._check_evaluations(trajectory)
                self._pending += pending_rows(trajectory)
                return
            del self._active[trajectory]
            if job.add(index, trajectory):
                self._end(job, "completed")
                job.finish()
        except Exception as error:
            self._fail(job, error)

    def _check_evaluations(self, trajectory: Trajectory) -> None:
        if trajectory.evaluations >= self.limits.evaluations:
            raise ValueError(
                f"{trajectory.plan.request.sampler} is not done after {trajectory.evaluations} "
                "network evaluations: use a larger tolerance, or another sampler"
            )

    def _fail(self, job: Job, error: Exception) -> None:
        job.fail(error)
        self._end(job, "failed")

    def _end(self, job: Job, outcome: Outcome) -> None:
        """Forget a request and its samples."""
        with self._changed:
            if job not in self._jobs:  # it has ended before
                return
            del self._jobs[job]
            with suppress(ValueError):
                self._turns.remove(job)
        self._active = {key: value for key, value in self._active.items() if value[0] is not job}
        self._pending = deque(row for row in self._pending if row.trajectory in self._active)
        self.counters.count_request(outcome, job.count, job.seconds)
