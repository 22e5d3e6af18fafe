import itertools

import numpy as np
import pytest

from pqf_jax import data, errors

NUM_TRAIN, NUM_TEST, BATCH = 24, 10, 8


def draws_as_image(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
  """Augments to a record of the arguments: row 0 the image, row 1 draws."""
  return np.stack([image[0, 0], (draws * 256).astype(np.uint8)])[None]


def records(count: int) -> list[dict]:
  return [
    {"image": np.full((4, 4, 3), i, np.uint8), "label": i % 5}
    for i in range(count)
  ]


DATASET = data.ImageDataset(
  name="numbers",
  train=records(NUM_TRAIN),
  test=records(NUM_TEST),
  num_classes=5,
  mean=(0.0, 0.0, 0.0),
  std=(1.0, 1.0, 1.0),
  augment=draws_as_image,
)


def train(num_steps: int, **settings) -> list[dict]:
  settings = {"batch_size": BATCH, "seed": 3} | settings
  return list(data.train_batches(DATASET, num_steps=num_steps, **settings))


def numbers(batches: list[dict]) -> list[int]:
  return [i for batch in batches for i in batch["image"][:, 0, 0, 0].tolist()]


def assert_same(left: list[dict], right: list[dict]) -> None:
  assert len(left) == len(right)
  for one, other in zip(left, right, strict=True):
    assert one.keys() == other.keys()
    for name, values in one.items():
      np.testing.assert_array_equal(values, other[name])


def test_a_resumed_run_gets_exactly_the_batches_that_remain():
  whole = train(12)
  for start in (0, 1, 2, 3, 7, 11, 12):
    assert_same(train(12 - start, start_step=start), whole[start:])


def test_without_a_number_of_steps_the_batches_do_not_end():
  endless = data.train_batches(DATASET, batch_size=BATCH, seed=3)
  assert_same(list(itertools.islice(endless, 9)), train(9))


def test_shapes_and_types():
  (batch,) = train(1)
  assert batch["image"].shape == (BATCH, 1, 2, 3)
  assert batch["image"].dtype == np.uint8
  assert batch["label"].shape == (BATCH,)
  assert batch["label"].dtype == np.int32


def test_every_epoch_has_every_image_once_in_a_new_order():
  batches = train(12, seed=0)
  epochs = [numbers(batches[start : start + 3]) for start in range(0, 12, 3)]
  assert all(sorted(epoch) == list(range(NUM_TRAIN)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 4


def test_an_epoch_leaves_out_only_what_fills_no_batch():
  # 24 = 2 * 10 + 4.
  batches = train(40, batch_size=10)
  epochs = [numbers(batches[start : start + 2]) for start in range(0, 40, 2)]
  assert all(len(set(epoch)) == 20 for epoch in epochs)
  assert set(itertools.chain(*epochs)) == set(range(NUM_TRAIN))


def test_labels_stay_with_their_images():
  for batch in train(6):
    np.testing.assert_array_equal(
      batch["image"][:, 0, 0, 0] % 5, batch["label"]
    )


def test_seeds_differ_and_no_epoch_of_one_is_an_epoch_of_another():
  orders = []
  for seed in (-1, 0, 1, 2):
    batches = train(9, seed=seed)
    orders += [tuple(numbers(batches[i : i + 3])) for i in (0, 3, 6)]
  assert len(set(orders)) == len(orders)


def test_draws_are_fresh_for_every_image_of_every_step():
  draws = np.concatenate([batch["image"][:, 0, 1] for batch in train(60)])
  # Of 480 triples of bytes two may be equal by chance (1 %), not many.
  assert len(np.unique(draws, axis=0)) > 60 * BATCH - 5
  # 480 draws of 0..255: mean 127.5, standard error 3.4.
  np.testing.assert_allclose(draws.mean(axis=0), 127.5, atol=14)


@pytest.mark.parametrize("count", [2, 8])
def test_the_shares_of_the_processes_are_the_batch_of_one(count: int):
  def join(shares: list[list[dict]]) -> list[dict]:
    return [
      {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
      for batches in zip(*shares, strict=True)
    ]

  share = [
    {"process_index": index, "process_count": count} for index in range(count)
  ]
  assert_same(join([train(5, **one) for one in share]), train(5))
  evaluated = [
    list(data.eval_batches(DATASET, batch_size=BATCH, **one)) for one in share
  ]
  assert_same(
    join(evaluated), list(data.eval_batches(DATASET, batch_size=BATCH))
  )


@pytest.mark.parametrize("num_images", [1, 7, 8, 25])
@pytest.mark.parametrize("process_count", [1, 3, 4])
@pytest.mark.parametrize("share", [1, 4])
def test_processes_together_count_exactly_all_images(
  num_images: int, process_count: int, share: int
):
  dataset = DATASET._replace(test=records(num_images))
  images, lengths = [], []
  for index in range(process_count):
    batches = list(
      data.eval_batches(
        dataset,
        batch_size=share * process_count,
        process_index=index,
        process_count=process_count,
      )
    )
    lengths.append(len(batches))
    for batch in batches:
      assert batch["image"].shape == (share, 4, 4, 3)
      images += batch["image"][batch["mask"] > 0, 0, 0, 0].tolist()
  # As many batches each, or a collective would wait for ever.
  assert lengths == [-(-num_images // (share * process_count))] * process_count
  assert sorted(images) == list(range(num_images))


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8, 10, 16])
def test_evaluation_counts_every_image_once_and_in_order(batch_size: int):
  batches = list(data.eval_batches(DATASET, batch_size=batch_size))
  assert {batch["image"].shape for batch in batches} == {(batch_size, 4, 4, 3)}
  image, label, mask = (
    np.concatenate([batch[name] for batch in batches])
    for name in ("image", "label", "mask")
  )
  assert (image.dtype, label.dtype, mask.dtype) == (
    np.uint8,
    np.int32,
    np.float32,
  )
  assert mask.tolist() == [1.0] * NUM_TEST + [0.0] * (len(mask) - NUM_TEST)
  assert image[:NUM_TEST, 0, 0, 0].tolist() == list(range(NUM_TEST))
  assert label[:NUM_TEST].tolist() == [i % 5 for i in range(NUM_TEST)]
  assert len(mask) - NUM_TEST < batch_size


def test_a_batch_larger_than_the_data_set_is_refused():
  with pytest.raises(errors.InputError, match="25 images .* the 24 training"):
    train(1, batch_size=25)


@pytest.mark.parametrize(("batch_size", "count"), [(8, 3), (0, 1), (-8, 2)])
def test_a_batch_that_cannot_be_shared_is_refused(batch_size: int, count: int):
  with pytest.raises(errors.InputError, match=f"{batch_size} .* {count} proc"):
    train(1, batch_size=batch_size, process_count=count)
  with pytest.raises(errors.InputError, match=f"{batch_size} .* {count} proc"):
    data.eval_batches(DATASET, batch_size=batch_size, process_count=count)


def test_a_process_that_does_not_exist_is_refused():
  with pytest.raises(errors.InputError, match="no process 2: .* 0 to 1"):
    train(1, process_index=2, process_count=2)


def test_an_error_while_reading_reaches_the_caller():
  class Bad(list):
    def __getitem__(self, index: int) -> dict:
      raise errors.InputError("image 7 is spoiled")

  spoiled = DATASET._replace(train=Bad(DATASET.train))
  batches = data.train_batches(spoiled, batch_size=BATCH, seed=0)
  with pytest.raises(errors.InputError, match="spoiled") as caught:
    next(batches)
  assert str(caught.value) == "image 7 is spoiled"
