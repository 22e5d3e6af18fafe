import pytest

from pqf_jax import errors, models
from pqf_jax.models import mask_rcnn, resnet


def test_models_are_found_by_the_names_of_their_modules():
  assert models.get_model("resnet") is resnet
  assert models.get_model("mask_rcnn") is mask_rcnn


def test_parts_of_models_are_no_models():
  parts = {"torch_names", "authors_files", "layers", "network", "rpn"}
  assert not parts & set(models.list_models())
  with pytest.raises(errors.InputError, match="torch_names"):
    models.get_model("torch_names")


def test_an_unknown_model_is_refused_with_the_nearest():
  with pytest.raises(errors.InputError, match="mean 'resnet'.*there are .*res"):
    models.get_model("resnet18")
  with pytest.raises(errors.InputError, match="no model is named 'zzz': there"):
    models.get_model("zzz")
