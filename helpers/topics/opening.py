"""How a topic notebook begins: one call that checks its parameters before any work, and opens what they name."""

from helpers import recipes
from helpers.recipes import PARAMETERS, SCALES, Parameter, Rule
from helpers.settings import ParameterError, check, local_model, read_given

Short = str | type | range | tuple | list


def opening(namespace: dict, *pipelines: str, **own: Short) -> None:
    """Check the parameters in `namespace` (the notebook's `globals()`), fill in their defaults, quiet the libraries.

    `pipelines` are parameters that the pipeline has too, with its rules; `own` gives the rule of each other one:

        opening(globals(), "dataset_id", "seed", scale=("tiny", "7b"), pictures=range(8, 124), rate=(0.0, 1e-4),
                only=bool, run="a run's name, or None", ranks=[range(1, 1000)])

    a choice of words; whole numbers; a number above the first and at most the second; True or False; text that says
    what it is (None is accepted where it ends so); whole numbers with commas between them, which become a list.
    A None that stands for the scale's own value (`dataset_id`, `max_pixels` …) is replaced by it in `namespace`.

    Raises ParameterError, one sentence, for a value that its rule refuses and for a name that papermill or the command
    line gives and the notebook does not have.
    """
    rules = {name: PARAMETERS[name] for name in pipelines}
    rules |= {name: Parameter(_rule(short), optional=isinstance(short, str) and short.endswith("None"))
              for name, short in own.items()}  # fmt: skip
    read_given(namespace, rules)
    check({name: namespace[name] for name in rules}, rules)
    defaults = SCALES.get(namespace.get("scale", ""), {})
    namespace.update({name: defaults[name] for name in rules if namespace[name] is None and name in defaults})
    check({name: namespace[name] for name in rules}, rules)
    for name, short in own.items():
        if isinstance(short, list):
            namespace[name] = [int(number) for number in str(namespace[name]).split(",")]

    from helpers.runs import quiet_libraries  # imports them, so only once the parameters are right

    quiet_libraries()


def _rule(short: Short) -> Rule:
    """The rule that a short form of `opening` stands for."""
    if isinstance(short, str):
        return recipes.text(short.removesuffix(", or None"))
    if isinstance(short, range):
        return recipes.whole(short.start, short.stop - 1)
    if isinstance(short, list):
        (each,) = short
        expected = f"whole numbers from {each.start} to {each.stop - 1} with commas between them, such as 2,8"
        return Rule(expected, lambda value: all(n.isdecimal() and int(n) in each for n in str(value).split(",")))
    if isinstance(short, tuple):
        return recipes.one_of(*short) if isinstance(short[0], str) else recipes.number(*short)
    return recipes.FLAG


def model_path(scale: str, model_id: str | None) -> str:
    """What `from_pretrained` takes: `model_id`, or the scale's own model where it is None.

    Raises ParameterError where 7B finds no GPU, or a folder holds no model.
    """
    if scale == "7b":
        import torch

        if not torch.cuda.is_available():
            raise ParameterError("scale='7b' needs a GPU, and this machine shows none; take scale='tiny'.")
    model_id = model_id or SCALES[scale]["model_id"]
    return local_model(model_id) or model_id
