import math
import types

import pytest

from pqf_jax import errors, registry

BUILT_IN = {"square_root": "math:sqrt", "numbers": "math"}


@pytest.fixture
def functions() -> registry.Registry:
  return registry.Registry(
    "function", BUILT_IN, entry_points="pqf_jax.test_functions"
  )


@pytest.fixture
def outside(tmp_path, monkeypatch):
  """Installs a package with these entry points."""

  def install(*lines: str) -> None:
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: outside\nVersion: 1.0\n")
    group = "\n".join(["[pqf_jax.test_functions]", *lines])
    (info / "entry_points.txt").write_text(group)
    (tmp_path / "outside.py").write_text("def double(x): return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)

  return install


def test_names_are_built_in_registered_or_entry_points(functions, outside):
  outside("double = outside:double")
  functions.register("negate", lambda x: -x)
  functions.register("sine", "math:sin")
  assert functions.names() == [
    "double",
    "negate",
    "numbers",
    "sine",
    "square_root",
  ]
  assert functions.get("double")(3) == 6
  assert functions.get("negate")(3) == -3
  assert functions.get("sine") is math.sin
  assert functions.get("square_root") is math.sqrt
  assert functions.get("numbers") is math


def test_an_unknown_name_is_answered_with_the_nearest(functions):
  with pytest.raises(errors.InputError) as caught:
    functions.get("squareroot")
  assert str(caught.value) == (
    "no function is named 'squareroot': did you mean 'square_root'? there are "
    "numbers, square_root"
  )
  with pytest.raises(errors.InputError, match="named 'zzz': there are numbers"):
    functions.get("zzz")


def test_a_name_has_one_value(functions, outside):
  module = types.ModuleType("toy")
  functions.register("toy", module)
  functions.register("toy", module)
  functions.register("numbers", "math")
  for name in ("toy", "numbers"):
    with pytest.raises(errors.InputError, match=f"named '{name}', .*; rename"):
      functions.register(name, "cmath")
  assert functions.get("toy") is module
  outside("numbers = outside")
  with pytest.raises(errors.InputError, match="'numbers', 'math' and 'outsid"):
    functions.get("numbers")


def test_nothing_is_imported_before_it_is_asked_for(functions):
  functions.register("broken", "no_such_module_of_ours")
  assert "broken" in functions.names()
  with pytest.raises(ModuleNotFoundError, match="no_such_module_of_ours"):
    functions.get("broken")
