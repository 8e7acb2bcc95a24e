"""Profiles: columns of tensors, bins, counts that add up, and their messages."""

from __future__ import annotations

import numpy as np
import pytest

from tidegate.kernel.profiles.baseline import Baseline, training_baseline
from tidegate.kernel.profiles.bins import Bins, count, learn, learn_all, learn_from_summaries, summarize
from tidegate.kernel.profiles.columns import Columns, SampledTensor, add_tensor
from tidegate.kernel.profiles.piece import ProfilePiece, PublishedBins, SampledPrediction, Unreadable
from tidegate.kernel.profiles.predictions import add_outputs, read_predictions
from tidegate.kernel.profiles.profile import Profile
from tidegate.kernel.protocol.tensors import pack_strings


def _tensor(name: str, array: np.ndarray, datatype: str = "FP32") -> SampledTensor:
    return SampledTensor(name, datatype, array.shape[1:], array.tobytes())


def _columns(*tensors: SampledTensor, rows: int, redact: tuple[str, ...] = ()) -> Columns:
    columns = Columns(rows)
    for tensor in tensors:
        add_tensor(columns, tensor, redact)
    return columns


def test_a_row_of_numbers_has_one_column_each() -> None:
    table = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    columns = _columns(_tensor("x", table), rows=3)
    assert {name: each.tolist() for name, each in columns.numbers.items()} == {
        "x[0]": [1, 3, 5],
        "x[1]": [2, 4, 6],
    }


def test_an_image_has_statistics_of_each_channel() -> None:
    image = np.zeros((2, 3, 20, 20), np.float32)
    image[1, 2] = 4
    columns = _columns(_tensor("image", image), rows=2)
    assert sorted(columns.numbers)[:3] == ["image.max[0]", "image.max[1]", "image.max[2]"]
    assert columns.numbers["image.mean[2]"].tolist() == [0, 4]
    assert len(columns.numbers) == 12


def test_a_large_tensor_without_channels_is_described_as_a_whole() -> None:
    columns = _columns(_tensor("x", np.ones((2, 300), np.float32)), rows=2)
    assert sorted(columns.numbers) == ["x.max", "x.mean", "x.min", "x.sd"]


def test_the_values_of_short_strings_are_counted_and_those_of_texts_are_not() -> None:
    short = SampledTensor("city", "BYTES", (1,), pack_strings(["Bern", "Oslo", "Bern"]))
    long = SampledTensor("text", "BYTES", (1,), pack_strings(["a word", "x" * 100, "b"]))
    columns = _columns(short, long, rows=3)
    assert columns.values == {"city": ["Bern", "Oslo", "Bern"]}
    assert columns.numbers["text.length"].tolist() == [6, 100, 1]
    assert columns.numbers["text.words"].tolist() == [2, 1, 1]


def test_a_redacted_string_has_only_its_length() -> None:
    city = SampledTensor("city", "BYTES", (1,), pack_strings(["Bern", "Oslo"]))
    columns = _columns(city, rows=2, redact=("city",))
    assert columns.values == {}
    assert list(columns.numbers) == ["city.length"]


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="reshape"):
        _columns(SampledTensor("x", "FP32", (2,), b"\0" * 12), rows=2)


def test_each_bin_has_the_same_share_of_the_values_it_was_learned_from() -> None:
    values = np.random.default_rng(1).standard_normal(32_000)
    counts = count(values, learn(values))
    assert len(counts) == 32
    assert counts.min() == counts.max() == 1000


def test_equal_values_share_a_bin() -> None:
    values = np.array([0.0] * 70 + [1.0] * 30)
    assert count(values, learn(values)).tolist() == [70, 30, 0]


def test_bins_from_the_summaries_of_replicas_are_like_those_of_all_rows() -> None:
    random = np.random.default_rng(2)
    parts = [random.standard_normal(700), random.standard_normal(300) + 3]
    bins = learn_from_summaries([summarize(part) for part in parts])
    shares = count(np.concatenate(parts), bins) / 1000
    assert len(bins.cuts) == 31
    assert np.abs(shares - 1 / 32).max() < 0.01


def test_a_column_without_a_number_has_one_bin() -> None:
    assert learn(np.array([np.nan, np.inf])) == Bins((), 0.0, 0.0)
    assert learn_from_summaries([summarize(np.array([np.nan]))]) == Bins((), 0.0, 0.0)


def test_profiles_of_parts_add_up_to_the_profile_of_all_rows() -> None:
    random = np.random.default_rng(3)
    table = random.standard_normal((500, 3))
    table[::50, 1] = np.nan
    names: list[str | None] = [str(each) for each in random.integers(0, 4, 500)]
    bins = learn_all(Columns(500, {"a": table[:, 0], "b": table[:, 1]}))

    def profile(rows: slice) -> Profile:
        found = Profile()
        part = table[rows]
        found.count(Columns(len(part), {"a": part[:, 0], "b": part[:, 1]}, {"n": names[rows]}), bins)
        return found

    whole, first, second = profile(slice(0, 500)), profile(slice(0, 123)), profile(slice(123, 500))
    first.add(second)
    assert first.rows == 500
    assert first.values["n"] == whole.values["n"]
    assert first.numbers["b"].missing == 10
    for name in ("a", "b"):
        assert first.numbers[name].counts.tolist() == whole.numbers[name].counts.tolist()
        assert first.numbers[name].mean == pytest.approx(whole.numbers[name].mean)
        assert first.numbers[name].most == whole.numbers[name].most


def test_values_outside_the_baseline_are_counted_exactly() -> None:
    bins = {"x": Bins((1.0, 2.0), 0.0, 3.0)}
    profile = Profile()
    profile.count(Columns(5, {"x": np.array([-1.0, 0.5, 2.5, 3.5, 9.0])}), bins)
    assert (profile.numbers["x"].below, profile.numbers["x"].above) == (1, 2)


def test_profiles_with_other_bins_are_not_added() -> None:
    one, other = Profile(), Profile()
    one.count(Columns(1, {"x": np.array([1.0])}), {"x": Bins((1.0,), 0, 1)})
    other.count(Columns(1, {"x": np.array([1.0])}), {"x": Bins((1.0, 2.0), 0, 1)})
    with pytest.raises(ValueError, match="different bins"):
        one.add(other)


def test_probabilities_have_a_label_a_confidence_and_a_score() -> None:
    table = np.array([[0.9, 0.1], [0.3, 0.7]], np.float32)
    found = read_predictions([_tensor("p", table)], 2)
    assert found.labels == ["0", "1"]
    assert found.confidence is not None
    assert found.confidence.tolist() == pytest.approx([0.9, 0.7])
    assert found.scores is not None
    assert found.scores.tolist() == pytest.approx([0.1, 0.7])


def test_an_integer_beside_probabilities_is_the_label() -> None:
    label = SampledTensor("label", "INT64", (), np.array([7, 8]).tobytes())
    table = np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    found = read_predictions([label, _tensor("p", table, "FP64")], 2)
    assert (found.labels, found.scores) == (["7", "8"], None)


def test_a_single_number_is_a_prediction_of_a_number() -> None:
    columns = Columns(2)
    found = add_outputs(columns, [_tensor("y", np.array([[3.5], [-1.0]]), "FP64")])
    assert found.labels is None
    assert columns.numbers["prediction"].tolist() == [3.5, -1.0]


def test_logits_are_columns_of_their_own() -> None:
    columns = Columns(1)
    add_outputs(columns, [_tensor("logits", np.array([[3.5, -1.0]]), "FP64")])
    assert sorted(columns.numbers) == ["logits[0]", "logits[1]"]


def test_a_piece_survives_its_message() -> None:
    columns = Columns(3, {"x": np.array([1.0, 2.0, np.nan])}, {"n": ["a", None, "b"]})
    piece = ProfilePiece("r-1", 1.0, 2.0, "b1")
    piece.profile.count(columns, {"x": Bins((1.5,), 1.0, 2.0)})
    piece.summaries["x"] = summarize(columns.numbers["x"])
    piece.predictions.append(SampledPrediction("id", "a", 0.5, None, 1.5))
    read = ProfilePiece.from_bytes(piece.to_bytes())
    assert read.profile.to_json() == piece.profile.to_json()
    assert (read.summaries, read.predictions) == (piece.summaries, piece.predictions)


@pytest.mark.parametrize(
    "raw", [b"", b"x", ProfilePiece("r", 0, 0).to_bytes()[:-4], b"x\x9c\x03\x00\0\0\0\1"]
)
def test_other_bytes_are_no_piece(raw: bytes) -> None:
    with pytest.raises(Unreadable):
        ProfilePiece.from_bytes(raw)


def test_bins_survive_their_message() -> None:
    bins = PublishedBins("b1", {"x": Bins((1.0, 2.0), 0.0, 3.0)})
    assert PublishedBins.from_bytes(bins.to_bytes()) == bins
    with pytest.raises(Unreadable):
        PublishedBins.from_bytes(b"no")


def test_a_baseline_survives_its_document_and_refuses_counts_of_other_bins() -> None:
    baseline = training_baseline(Columns(100, {"x": np.arange(100.0)}))
    document = baseline.to_json()
    assert Baseline.from_json(document).to_json() == document
    document["bins"]["x"][0].pop()
    with pytest.raises(ValueError, match="do not fit"):
        Baseline.from_json(document)


def test_the_deviation_of_numbers_without_a_square_is_unknown() -> None:
    """The largest float often stands for a missing value."""
    columns = _columns(_tensor("x", np.array([[1.0], [1e300]]), "FP64"), rows=2)
    profile = Profile()
    profile.count(columns, {"x": Bins((1.0,), 1.0, 1e300)})
    for found in (profile, Profile.from_json(profile.to_json())):
        assert found.numbers["x"].sd is None


def test_counts_that_are_too_large_are_no_baseline() -> None:
    document = training_baseline(Columns(100, {"x": np.arange(100.0)})).to_json()
    document["profile"]["numbers"]["x"][0][0] = 2**70
    with pytest.raises(ValueError, match="wrong type"):
        Baseline.from_json(document)


def test_the_strings_of_redacted_outputs_are_no_predictions() -> None:
    names = SampledTensor("name", "BYTES", (1,), pack_strings(["Ann", "Bo"]))
    columns = Columns(2)
    assert add_outputs(columns, [names], ("name",)).labels is None
    assert not columns.values
    assert columns.numbers["name.length"].tolist() == [3.0, 2.0]
    chances = _tensor("p", np.array([[0.25, 0.75], [0.5, 0.5]], np.float32))
    assert add_outputs(Columns(2), [chances], ("p",)).confidence is not None, "numbers are counted in bins"
