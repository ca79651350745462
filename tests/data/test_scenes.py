import numpy as np
import pytest

from icone_hf import load_groups
from icone_hf.data.groups import check_disjoint
from icone_hf.data.scenes import (
    GROUNDS,
    SIZES,
    another_view,
    compose_scene,
    describe_scene,
    draw_scene,
    draw_scenes,
    relation,
    scene_objects,
)


def test_there_are_enough_objects_and_no_two_of_one_name():
    names = [item.name for item in scene_objects()]
    assert len(names) == len(set(names)) >= 500


def test_the_same_seed_gives_the_same_scenes_whatever_their_number():
    few, many = (load_groups("openmoji-scenes", "train", num_groups=n, image_size=64) for n in (5, 12))
    assert few["captions"][:] == many["captions"][:5]
    assert all(np.array_equal(few[i]["image"], many[i]["image"]) for i in range(5))
    assert load_groups("openmoji-scenes", "train", num_groups=5, seed=1)["captions"][:] != few["captions"][:]


def test_groups_keep_the_contract():
    splits = {
        split: load_groups("openmoji-scenes", split, num_groups=6, image_size=80)
        for split in ("train", "validation", "test")
    }
    check_disjoint(splits)
    for groups in splits.values():
        assert len(groups) == 6
        assert all(len(set(captions)) == 5 for captions in groups["captions"])
        assert groups[0]["image"].size == (80, 80)
    assert splits["train"]["captions"][:] != splits["test"]["captions"][:]


def test_boxes_hold_the_objects():
    """Inside every box something is drawn; outside of all boxes there is the ground alone."""
    for row in load_groups("openmoji-scenes", "test", num_groups=30, image_size=160):
        pixels = np.asarray(row["image"]).astype(int)
        is_ground = (np.abs(pixels - GROUNDS[row["ground"]]).sum(-1)) == 0
        outside = np.ones(is_ground.shape, bool)
        for item in row["objects"]:
            left, top, right, bottom = (round(edge) for edge in item["box"])
            assert 0 <= left < right <= 161
            assert 0 <= top < bottom <= 161
            assert (~is_ground[top:bottom, left:right]).mean() > 0.05
            outside[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = False
        assert is_ground[outside].all()


@pytest.mark.parametrize("index", range(20))
def test_captions_are_true_of_the_scene(index):
    scene = compose_scene(3, "train", index)
    first, second = scene.objects[:2]
    captions = describe_scene(scene)
    forward, inverse = relation(first, second)
    dx, dy = (second.centre[axis] - first.centre[axis] for axis in (0, 1))
    assert (forward in ("to the left of", "to the right of")) == (abs(dx) >= abs(dy))
    assert {forward, inverse} in ({"to the left of", "to the right of"}, {"above", "below"})
    if forward == "to the left of":
        assert first.left + first.side / 2 < second.left + second.side / 2
    assert f"{first.object.name} {forward}" in captions[0]
    assert f"{second.object.name} {inverse}" in captions[1]
    assert captions[2].endswith(f"{scene.ground} background")
    for placed in scene.objects:
        assert f"{placed.size} {placed.object.name}" in captions[3]
        assert SIZES[placed.size][0] <= placed.side <= SIZES[placed.size][1]
        assert placed.object.name in captions[2]
        assert placed.object.alias in captions[4]


def test_objects_do_not_overlap():
    for index in range(100):
        objects = compose_scene(0, "test", index).objects
        assert not any(a.overlaps(b) for i, a in enumerate(objects) for b in objects[i + 1 :])


def test_one_scene_in_twenty_is_a_near_miss_of_the_one_before():
    scenes = [compose_scene(0, "train", index) for index in range(1000)]
    near_misses = [
        index
        for index in range(1, 1000)
        if {p.object for p in scenes[index].objects} == {p.object for p in scenes[index - 1].objects}
    ]
    assert 25 <= len(near_misses) <= 80
    for index in near_misses:
        scene, twin = scenes[index], scenes[index - 1]
        assert scene.objects[0].object == twin.objects[1].object
        assert describe_scene(scene)[0] != describe_scene(twin)[0]
        assert not np.array_equal(draw_scene(scene, 64), draw_scene(twin, 64))


def test_another_view_shows_the_same_elsewhere():
    for index in range(60):
        scene = compose_scene(0, "test", index)
        view = another_view(scene, index)
        assert describe_scene(view) == describe_scene(scene)
        assert relation(*view.objects[:2]) == relation(*scene.objects[:2])
        assert all(SIZES[placed.size][0] <= placed.side <= SIZES[placed.size][1] for placed in view.objects)
        assert [placed.object for placed in view.objects] == [placed.object for placed in scene.objects]
        assert not any(a.overlaps(b) for i, a in enumerate(view.objects) for b in view.objects[i + 1 :])
        assert all(a.centre != b.centre for a, b in zip(view.objects, scene.objects, strict=True))
        assert view == another_view(scene, index) != another_view(scene, index + 1)


def test_views_are_drawn_row_by_row():
    scenes, views = (draw_scenes("test", 4, image_size=64, view=view) for view in (0, 1))
    assert views["captions"][:] == scenes["captions"][:]
    assert not any(np.array_equal(scenes[i]["image"], views[i]["image"]) for i in range(4))
    assert not set(views["image_id"]) & set(scenes["image_id"])
