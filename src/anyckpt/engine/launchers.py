"""Which of several processes this one is, as what started them says in the environment of each.

Nobody asks here but who is told to: a shell inside an allocation of Slurm has variables of Slurm, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from anyckpt.data_classes import dataclass
from anyckpt.engine.destination import Share
from anyckpt.errors import UsageError


@dataclass(frozen=True)
class Launcher:
    """What starts several processes of one program.

    Attributes:
        name: as people call it.
        rank: the variable that says which process this is, from 0.
        sizes: variables of which the first that is there says how many there are.
    """

    name: str
    rank: str
    sizes: tuple[str, ...]


LAUNCHERS = (
    Launcher("torchrun", "RANK", ("WORLD_SIZE",)),
    Launcher("mpirun of Open MPI", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    Launcher("mpirun of MPICH and Intel MPI", "PMI_RANK", ("PMI_SIZE",)),
    Launcher("srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
)
"""The innermost first: torchrun and mpirun run inside jobs of Slurm, whose variables are those of the whole job then.

Of a job's script ``SLURM_NTASKS`` says how many tasks the job may have, of a step of ``srun`` both say its own.
"""


def launched_share(environment: Mapping[str, str]) -> Share:
    """The share of the work that is this process's: its rank, counted from 1, of as many as there are processes.

    Args:
        environment: its variables, such as ``os.environ``.

    Raises:
        UsageError: no launcher says which process this is, or what one says is not possible.
    """
    for launcher in LAUNCHERS:
        size = next((name for name in launcher.sizes if environment.get(name)), None)
        if environment.get(launcher.rank) and size is not None:
            rank, count = environment[launcher.rank], environment[size]
            if not (_is_count(rank) and _is_count(count) and int(rank) < int(count)):
                raise UsageError(
                    f"the variables of {launcher.name} do not say which of how many processes this is",
                    expected=f"{launcher.rank} from 0 to {size} - 1",
                    found=f"{launcher.rank}={rank}, {size}={count}",
                    remedy="say it with --share I/N, or unset them",
                )
            return Share(int(rank) + 1, int(count))
    raise UsageError(
        "nothing says which of how many processes this is",
        expected="; ".join(f"{one.rank} and {one.sizes[-1]} ({one.name})" for one in LAUNCHERS),
        found=", ".join(
            f"{name} alone" for one in LAUNCHERS for name in (one.rank, *one.sizes) if environment.get(name)
        )
        or "none of them",
        remedy="start the processes with one of these, or say it with --share I/N",
    )


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal()
