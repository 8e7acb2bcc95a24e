"""Whether memory ran out, as either kind of cgroup tells it."""

from services.worker.adapters.memory_limit import kills


def test_both_kinds_of_cgroup_and_none(tmp_path):
    assert kills(tmp_path) == 0
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert kills(tmp_path) == 2
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 0\n")
    assert kills(tmp_path) == 3
    (tmp_path / "memory.events").write_text("low 0\n")
    assert kills(tmp_path) == 0
