# SPDX-License-Identifier: Apache-2.0
"""How the tests of errors call an op wrongly, from the kernel and under fake tensors, and what they
change in its arguments."""

import pytest
import torch
from torch._subclasses import FakeTensorMode


def check_message(message, op, *arguments, **options):
    """Asserts that the call raises RuntimeError with "<op>: <message>"."""
    with pytest.raises(RuntimeError) as caught:
        op(*arguments, **options)
    assert f"{op.__name__}: {message}" in str(caught.value)


def check_fake_message(message, op, *arguments, **options):
    """The same with fake tensors, which have shapes and dtypes but no values."""
    with FakeTensorMode() as mode:

        def fake(x):
            return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

        options = {name: fake(x) for name, x in options.items()}
        check_message(message, op, *map(fake, arguments), **options)


def replaced(name, change):
    """Maps arguments by name to the same with one of them changed."""
    return lambda inputs: inputs | {name: change(inputs[name])}


def set_first(name, value):
    """Maps arguments by name to the same with another first element in one tensor."""

    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return replaced(name, change)
