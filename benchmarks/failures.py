"""An arm for which there is no memory is a result, not the end of the others.

attempt(lambda: model(**inputs))   ->   None, or "CUDA out of memory. Tried to allocate 20.00 GiB."
"""

import gc
from collections.abc import Callable

import torch

_REASON_LENGTH = 200  # characters; CUDA goes on with advice


def attempt(call: Callable[[], object]) -> str | None:
    """Call it, and tell why there was no memory for it; any other error comes out as it is."""
    try:
        call()
        return None
    except Exception as error:
        failure = memory_failure(error)
        if failure is None:
            raise
    # Only here does nothing refer to the tensors of the failed call any more.
    gc.collect()
    torch.cuda.empty_cache()
    return failure


def memory_failure(error: BaseException) -> str | None:
    """What to tell about an error that means there was too little memory, None for any other."""
    notes = getattr(error, "__notes__", [])
    cause: BaseException | None = error
    while cause is not None:
        # PyTorch has no class for this on a CPU.
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(cause):
            said = str(cause).strip().partition("\n")[0] or type(cause).__name__
            return ", ".join([said[:_REASON_LENGTH], *notes])
        cause = cause.__cause__ or cause.__context__  # Dynamo wraps what it meets while compiling
    return None
