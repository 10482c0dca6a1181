"""The one training loop: every stage and size runs through `train`."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lingbot_jax.data.crops import resize_crops
from lingbot_jax.data.loader import BatchStream, Dataset
from lingbot_jax.models import params
from lingbot_jax.parallel import multihost
from lingbot_jax.parallel.mesh import make_mesh
from lingbot_jax.training import curriculum
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.goodput import Goodput
from lingbot_jax.training.latents import check_latents, reading_of
from lingbot_jax.training.metrics import MetricsWriter, StepProgress
from lingbot_jax.training.networks import templates
from lingbot_jax.training.objectives import Constants, Objective
from lingbot_jax.training.objectives.world import draw_known
from lingbot_jax.training.report import Profile, Report
from lingbot_jax.training.run_dir import init_run_dir
from lingbot_jax.training.saving import Saving
from lingbot_jax.training.start import fresh_state, objective_of, resolve
from lingbot_jax.training.state import TrainState, abstract_state
from lingbot_jax.training.step import (
    Program,
    encode_program,
    make_step,
    networks_of,
    unpack_program,
    update_counts,
)
from lingbot_jax.training.wandb_run import open_wandb
from lingbot_jax.training.watchdog import bounded
from lingbot_jax.worlds.checkpoints import Checkpoints
from lingbot_jax.worlds.clips import prepare, prepare_latents
from lingbot_jax.worlds.open import find, open_encoders
from lingbot_jax.worlds.world import World

# A value that the experiment makes: the averaged world at a step -> numbers for the metrics, videos to look at.
Evaluate = Callable[[World, int], tuple[dict[str, float], dict[str, np.ndarray]]]


def train(config: TrainConfig, evaluate: Evaluate | None = None, profile: str = "") -> TrainState:
    """Trains from the newest checkpoint, else from `config.init`, else from a random initialisation.

    Runs `config.steps` steps in all, through the phases of the curriculum, writes metrics and checkpoints into
    `config.run`, and returns the state. With several processes all of them make this call, and all see the same
    batches, losses and errors.

    Args:
      evaluate: called every `config.validation.every` steps. profile: steps to trace, as "100" or "100-105".

    Raises:
      ConfigError: something that the user can mend; before the first step nothing is left behind.
      NonFiniteLoss: nothing of the bad step or after it was saved.
      SaveFailed: a checkpoint could not be written; those before it are whole.
      Preempted: SIGTERM came; the step that was running is done and saved.
    """
    goodput = Goodput()
    # --- What a user can have got wrong is found here, by all processes together.
    with multihost.agree_on_errors():
        config = resolve(config)
        config.check_crops()
        config.wandb.check()
        data = [Dataset(phase.data, reading=reading_of(phase)) for phase in config.phases()]
        check_latents(config.phases(), data)
        meshes = [make_mesh(phase.mesh) for phase in config.phases()]
        for phase, mesh in zip(config.phases(), meshes, strict=True):
            multihost.rows_of_process(mesh, phase.data.batch)
        objective = objective_of(config)
        counts = update_counts(config, objective)
        places = [abstract_state(config, mesh, objective.trains, counts) for mesh in meshes]

    with init_run_dir(config) as run, multihost.preemption() as stop:
        config = run.config
        # --- State: a checkpoint of this run, else what `init` names, else random; on the first phase's mesh.
        checkpoints = Checkpoints(config.run, keep=config.checkpoint.keep)
        restored = checkpoints.restore(vars(places[0]))
        state = fresh_state(config, meshes[0], objective) if restored is None else TrainState(**restored)
        start = int(state.step)
        saving = Saving(config.checkpoint, start)
        writer = None
        with multihost.agree_on_errors():
            if jax.process_index() == 0:
                wandb = open_wandb(config.run, config.wandb, dataclasses.asdict(config))
                writer = MetricsWriter(config.run, start, wandb)

        # --- Loop. The loss of a step is read while the next one runs; a checkpoint waits for its own.
        phase: _Phase | None = None
        watching = StepProgress(config.stage, start, config.steps), Profile(config.run, profile)
        with checkpoints, watching[0] as progress, watching[1] as trace:
            report = Report(config, writer, progress, goodput)
            goodput.restored()
            for step in range(start, config.steps):
                if phase is None or step == phase.end:
                    with goodput.on("compile"):
                        index = curriculum.phase_at(config, step)
                        if phase is not None:
                            phase.close()
                        phase = _Phase.enter(config, index, step, meshes[index], data[index], objective)
                        report.enter(phase.config)
                        places_now = jax.tree.map(lambda leaf: leaf.sharding, places[index])
                        state = jax.device_put(state, places_now, donate=True)  # never held twice

                name = f"step {step + 1}"
                work = "compile" if phase.compiles(step) else "step"
                watched = functools.partial(_watched, goodput, name, config.watchdog.step_seconds)
                with trace.step(step):
                    with watched("step"):
                        clock = report.clock(step, state)
                    waited = bounded(f"the clips of {name}", config.watchdog.data_seconds)
                    with goodput.on("data", report.busy_until), waited:
                        rows = phase.next()
                    clock.mark("data")
                    with watched(work):
                        batch = phase.encode(rows, step)
                        clock.mark("encode", batch)
                        state, metrics = phase.update(state, batch, step)
                        clock.mark("step", metrics)
                with watched(work):
                    report.later(step + 1, metrics, rows["record_ids"], clock)

                stopped = stop(step + 1)
                last = step + 1 == config.steps or stopped
                if last or saving.due(step + 1, checkpoints.busy):
                    with watched("step"):
                        report.now()
                    with goodput.on("checkpoint"):
                        run.check_owner()
                        checkpoints.save(step + 1, vars(state))
                        saving.done(step + 1)
                report.check_grace(checkpoints.save_seconds)
                every = config.validation.every
                if evaluate is not None and every and ((step + 1) % every == 0 or step + 1 == config.steps):
                    with goodput.on("evaluation"):
                        report.validation(step + 1, *evaluate(phase.world(state), step + 1))
                if stopped:
                    break
            if phase is not None:
                phase.close()
            with goodput.on("checkpoint"):
                checkpoints.wait()
            report.last_line()
        if writer is not None:
            writer.close()
        done = int(state.step)
        if done < config.steps:
            raise multihost.Preempted(f"stopped by a signal after step {done}, which is saved")
        return state


@contextlib.contextmanager
def _watched(goodput: Goodput, what: str, seconds: float | None, cause: str) -> Iterator[None]:
    """Counts the block as `cause`, and ends the process if `what` takes longer than `seconds`."""
    with goodput.on(cause), bounded(what, seconds):
        yield


@dataclasses.dataclass(frozen=True)
class _Phase:
    """What holds during one phase of the curriculum.

    Attributes:
      config: the run as this phase sees it. end: the step it ends before. codec, text: on its mesh.
      stream: host rows of every step, made ahead. rows: which of a batch this process loads.
      encode_clips, text: None where the data holds latents, which `unpack` makes ready.
    """

    config: TrainConfig
    mesh: Mesh
    end: int
    objective: Objective
    rows: range
    stream: BatchStream
    codec: Any
    text: Any
    constants: Constants
    encode_clips: Program | None
    unpack: Program
    programs: dict[tuple[str, ...], Program]

    @classmethod
    def enter(
        cls, config: TrainConfig, index: int, step: int, mesh: Mesh, data: Dataset, objective: Objective
    ) -> "_Phase":
        """Everything for the phase `index`, which `step` is in."""
        chosen = config.phases()[index]
        rows = multihost.rows_of_process(mesh, chosen.data.batch)
        resize = None if data.latents else functools.partial(resize_crops, size=chosen.size)
        codec, text = open_encoders(find(config.run), mesh)
        world = World({}, codec, text, config.world, mesh)
        constants = Constants(world.encode_text([config.world.null_text]), codec)
        return cls(
            config=chosen,
            mesh=mesh,
            end=curriculum.spans(config)[index][1],
            objective=objective,
            rows=rows,
            stream=BatchStream(data, rows, step, resize),
            codec=codec,
            text=None if data.latents else text,
            constants=constants,
            encode_clips=None if data.latents else encode_program(chosen, mesh),
            unpack=unpack_program(chosen, mesh),
            programs={},
        )

    def next(self) -> dict[str, Any]:
        """This process's rows of the next step."""
        return next(self.stream)

    def encode(self, rows: dict[str, Any], step: int) -> Any:
        """The step's clips as the networks see them, on the mesh; dispatched, not waited for."""
        batch, intervals = self.config.data.batch, self.config.intervals
        if self.encode_clips is None:
            latents = prepare_latents(self.config.world, rows, intervals)
            return self.unpack(multihost.global_array(self.mesh, latents, batch))
        known = draw_known(self.config.seed, step, batch, self.config.tasks)
        known = known[self.rows.start : self.rows.stop]
        clips = prepare(self.config.world, self.text, rows, known, intervals=intervals)
        return self.encode_clips(self.codec, self.text, multihost.global_array(self.mesh, clips, batch))

    def update(self, state: TrainState, batch: Any, step: int) -> tuple[TrainState, Any]:
        """The updates of a step; the program sees the networks that they read, and no other."""
        updates = self.objective.updates(step)
        names = networks_of(updates)
        if names not in self.programs:
            self.programs[names] = make_step(self.objective, self.config, self.mesh, updates)
        part, metrics = self.programs[names](state.part(names), batch, self.constants)
        return state.updated(part), metrics

    def compiles(self, step: int) -> bool:
        """Whether this step is the first of its program."""
        return networks_of(self.objective.updates(step)) not in self.programs

    def world(self, state: TrainState) -> World:
        """The world as it stands, with averaged parameters where they train."""
        modules = templates(self.config)
        networks = {
            name: params.with_arrays(modules[name], state.params[name] | state.ema.get(name, {}))
            for name in self.config.world.networks
        }
        return World(networks, self.codec, self.text, self.config.world, self.mesh)

    def close(self) -> None:
        self.stream.close()
