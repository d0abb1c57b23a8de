"""A snapshot whose record is damaged, over HTTP on a real pool: it strands neither its volume nor the others."""

from blockvirt.api.models import VolumeDeletion
from blockvirt.lun.leaf import decode
from blockvirt.meta.keys import Table
from blockvirt.meta.store import Writer
from blockvirt.meta.verify import verify_records
from blockvirt.snapshots.scheduled import ScheduledSnapshots
from blockvirt.units import KIB, MIB
from tests.api.conftest import PoolApi

CHUNK = 4 * KIB


async def damage(api: PoolApi, name: str) -> None:
    """Flip a bit of a snapshot's stored record."""
    key = api.services.snapshots.find(name).id.encode()

    def flip(writer: Writer) -> None:
        stored = writer.get(Table.SNAPSHOTS, key)
        assert stored is not None
        writer.put(Table.SNAPSHOTS, key, stored[:20] + bytes([stored[20] ^ 1]) + stored[21:])

    await api.pool.engine.store.commit(flip)


async def with_damage(api: PoolApi) -> None:
    """Make a volume of three snapshots, each with a chunk of its own, the second one damaged."""
    await api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v"})
    for number in range(3):
        await api.write("v", 0, bytes([number]) * CHUNK)
        await api.ok("POST", "/v1/snapshots", {"volume": "v", "name": f"s{number}"})
    await damage(api, "v@s1")


async def delete(api: PoolApi, query: str) -> VolumeDeletion:
    """Delete the volume, and have the answer checked against its model."""
    return VolumeDeletion.model_validate(await api.ok("DELETE", f"/v1/volumes/v?{query}"))


async def test_its_volume_says_what_is_in_the_way(pool_api: PoolApi) -> None:
    await with_damage(pool_api)
    for query in ("", "?purge=true"):
        answer = await pool_api.call("DELETE", f"/v1/volumes/v{query}")
        assert (answer.status, answer.json["code"]) == (409, "in-use"), answer.json
        assert "v@s1" in answer.json["detail"]
        assert "force" in answer.json["correction"]
    would = await delete(pool_api, "dry_run=true")
    assert not would.deleted
    assert [("v@s1" in each, "damaged" in each) for each in would.obstacles] == [(True, True)]
    await pool_api.write("v", 0, b"still in use" + bytes(CHUNK - 12))
    assert (await delete(pool_api, "force=true&purge=true")).deleted


async def test_by_force_its_volume_goes_whole(pool_api: PoolApi) -> None:
    await with_damage(pool_api)
    assert (await delete(pool_api, "force=true&purge=true")).deleted
    await pool_api.until_reclaimed()
    with pool_api.pool.engine.store.read() as reader:
        for table in (Table.VOLUMES, Table.SNAPSHOTS, Table.SNAPSHOT_NAMES, Table.POINTS, Table.SEALS, Table.LEAVES):
            assert not reader.count(table), table
        assert not list(verify_records(reader, decode))
    assert pool_api.pool.engine.storage.status().used_bytes == 0


async def test_a_clone_of_it_keeps_what_it_sees(pool_api: PoolApi) -> None:
    await with_damage(pool_api)
    await pool_api.ok("POST", "/v1/snapshots/v@s2/clone", {"name": "c"})
    assert (await delete(pool_api, "force=true&purge=true")).deleted
    await pool_api.until_reclaimed()
    assert await pool_api.read("c", 0, CHUNK) == bytes([2]) * CHUNK


async def test_the_trash_lets_go_of_it(pool_api: PoolApi) -> None:
    await with_damage(pool_api)
    gone = await delete(pool_api, "force=true")
    assert gone.purge_at is not None
    await pool_api.ok("DELETE", f"/v1/trash/{gone.volume.id}")
    await pool_api.until_reclaimed()
    assert (await pool_api.ok("GET", "/v1/trash"))["volumes"] == []


async def test_a_held_one_still_keeps_its_volume(pool_api: PoolApi) -> None:
    await with_damage(pool_api)
    await pool_api.ok("POST", "/v1/snapshots/v@s2/hold", {"tag": "legal"})
    answer = await pool_api.call("DELETE", "/v1/volumes/v?force=true&purge=true")
    assert (answer.status, answer.json["code"]) == (409, "in-use")
    assert "legal" in answer.json["detail"]


async def test_the_others_are_listed_and_it_is_named(pool_api: PoolApi) -> None:
    await with_damage(pool_api)
    listed = await pool_api.ok("GET", "/v1/snapshots?volume=v")
    assert [each["name"] for each in listed["snapshots"]] == ["s0", "s2"]
    assert listed["snapshots"][1]["parent_id"] == listed["snapshots"][0]["id"], "the nearest that can be shown"
    assert listed["damaged"] == ["v@s1"]
    first = await pool_api.ok("GET", "/v1/snapshots?limit=1")
    rest = await pool_api.ok("GET", f"/v1/snapshots?limit=1&page_token={first['next_page_token']}")
    assert [each["name"] for page in (first, rest) for each in page["snapshots"]] == ["s0", "s2"]
    assert first["damaged"] + rest["damaged"] == ["v@s1"]


async def test_the_others_are_pruned(pool_api: PoolApi) -> None:
    await with_damage(pool_api)
    volume_id = pool_api.services.catalogue.get("v").id
    found = ScheduledSnapshots(pool_api.pool.engine.store, pool_api.services.snapshots).of_volume(volume_id)
    assert [each.name for each in found] == ["s0", "s2"]


async def test_the_offline_check_names_it(pool_api: PoolApi) -> None:
    await with_damage(pool_api)
    with pool_api.pool.engine.store.read() as reader:
        findings = list(verify_records(reader, decode))
    assert [(each.code, each.what) for each in findings] == [("damaged-record", "snapshot v@s1")]


async def test_it_is_deleted_alone_by_force(pool_api: PoolApi) -> None:
    """The chunk that it alone saw comes back, the others stay."""
    await with_damage(pool_api)
    answer = await pool_api.call("DELETE", "/v1/snapshots/v@s1")
    assert (answer.status, answer.json["code"]) == (503, "damaged-record")
    assert "delete --force" in answer.json["correction"]
    would = await pool_api.ok("DELETE", "/v1/snapshots/v@s1?dry_run=true")
    assert [("v@s1" in each, "damaged" in each) for each in would["obstacles"]] == [(True, True)]
    used_bytes = pool_api.pool.engine.storage.status().used_bytes
    body = {"snapshots": ["v@s1", "v@s1"], "force": True}
    gone = await pool_api.ok("POST", "/v1/snapshots/delete", body)
    assert [each["name"] for each in gone["snapshots"]] == ["s1"]
    await pool_api.until_reclaimed()
    assert pool_api.pool.engine.storage.status().used_bytes == used_bytes - CHUNK
    listed = await pool_api.ok("GET", "/v1/snapshots?volume=v")
    assert ([each["name"] for each in listed["snapshots"]], listed["damaged"]) == (["s0", "s2"], [])
    with pool_api.pool.engine.store.read() as reader:
        assert not list(verify_records(reader, decode))
    assert (await delete(pool_api, "purge=true")).deleted, "nothing is in the way any more"


async def test_a_held_one_beside_it_keeps_both(pool_api: PoolApi) -> None:
    await with_damage(pool_api)
    await pool_api.ok("POST", "/v1/snapshots/v@s2/hold", {"tag": "legal"})
    body = {"snapshots": ["v@s1", "v@s2"], "force": True}
    assert await pool_api.refused("POST", "/v1/snapshots/delete", body) == (409, "in-use")
    assert (await pool_api.ok("GET", "/v1/snapshots?volume=v"))["damaged"] == ["v@s1"]
