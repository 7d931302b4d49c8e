# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The table of an operator's mistakes. One row, one mistake, unless its name says otherwise."""

from __future__ import annotations

import os

from ascend_direct.errors import ConfigError
from ascend_direct.names import CONFIG_FLAG, FLAG

from . import machines
from .row import Row

MEMCACHE = {"store": "memcache"}
ENV = "ASCEND_DIRECT_"
INSTALL = f"SGLang 0.6.0 is installed|Install SGLang 0.5.23|drop {FLAG}"


def _memcache(**options: object) -> dict[str, object]:
    return {**MEMCACHE, "memcache": options}


TEXT = (
    Row("text that is not JSON", ("is not JSON|use an object",), text="{store: local}"),
    Row("JSON that is no object", ("is not a JSON object|use one such as",), text='["local"]'),
    Row("an empty text", ("is not JSON|use an object",), text=""),
    Row("an option given twice", ("'store' is given twice",), text='{"store": "a", "store": "b"}'),
    Row("NaN", ("NaN is no JSON number",), text='{"batch_bytes": NaN}'),
    Row("a number without end", ("is not JSON",), text=f'{{"batch_bytes": {"9" * 5000}}}'),
    Row("brackets without end", ("is not JSON",), text="[" * 100_000),
    Row("half a character", ("surrogates not allowed",), text='{"store": "\\ud800"}'),
    Row("a file that is missing", ("{place}/no.json|No such file|use @",), text="@{place}/no.json"),
    Row("a file that is a directory", ("{place}|Is a directory|use @",), text="@{place}"),
    Row("a file name forgotten", ("cannot read the file|use @",), text="@"),
    Row("a file of nobody's home", ("home directory|use @",), text="@~no_such_user/a.json"),
    Row(
        "a file that nobody may read",
        ("/proc/self/mem|use @",),
        text="@/proc/self/mem",
    ),
    Row(
        "a file in another encoding",
        ("{place}/a.json|codec|use @",),
        text="@{place}/a.json",
        prepare=machines.json_file("a.json", {"model_id": "é"}, "latin-1"),
    ),
    Row(
        "a file that is not JSON",
        ("{place}/a.json is not JSON|use an object",),
        text="@{place}/a.json",
        prepare=machines.existing_file("a.json", b"store: local\n"),
    ),
)

OPTIONS = (
    Row("a misspelled option", ("'stroe'|did you mean 'store'",), options={"stroe": "local"}),
    Row(
        "a misspelled option of a section",
        ("'memcache.hcom_ulr'|did you mean 'memcache.hcom_url'",),
        options={"memcache": {"hcom_ulr": "tcp://h:1"}},
    ),
    Row(
        "an option outside its section",
        ("'dram_size'|did you mean 'memcache.dram_size'",),
        options={"dram_size": "1GB"},
    ),
    Row("an option of another product", ("'zzzz'|drop it|docs/",), options={"zzzz": 1}),
    Row("a section that is no object", ("memcache is 5|use a JSON object",), {"memcache": 5}),
    Row(
        "a number that is text",
        ('min_load_tokens is "many"|whole number',),
        {"min_load_tokens": "many"},
    ),
    Row(
        "a number that is true", ("min_load_tokens|use a whole number",), {"min_load_tokens": True}
    ),
    Row("a number with a fraction", ("belief_pages is 1.5|use a whole",), {"belief_pages": 1.5}),
    Row("a number that is null", ("batch_bytes is null|use a whole",), {"batch_bytes": None}),
    Row("a number too small", ("min_load_tokens is 0|use 1 or more",), {"min_load_tokens": 0}),
    Row("a number too large", ("selective_hits is 999|use 100 or less",), {"selective_hits": 999}),
    Row("a timeout of nothing", ("load_timeout_ms is 0|use 1 or more",), {"load_timeout_ms": 0}),
    Row("a negative timeout", ("store_timeout_ms is -1|use 1",), {"store_timeout_ms": -1}),
    Row("a timeout of an hour", ("lookup_timeout_ms|or less",), {"lookup_timeout_ms": 3_600_000}),
    Row("text that is a number", ("model_id is 7|use text",), {"model_id": 7}),
    Row(
        "true that is text",
        ('local.sync is "maybe"|use true or false',),
        {"local": {"sync": "maybe"}},
    ),
    Row(
        "a size in furlongs",
        ("store_queue_bytes: '4 furlongs'|512MB",),
        {"store_queue_bytes": "4 furlongs"},
    ),
    Row(
        "a size with a fraction",
        ("batch_bytes: '1.5GB'|write for example",),
        {"batch_bytes": "1.5GB"},
    ),
    Row(
        "a negative size",
        ("local.size_bytes: -1|write for example",),
        {"local": {"size_bytes": -1}},
    ),
    Row(
        "a size too small",
        ('local.size_bytes is "1KB"|use 1048576 or more',),
        {"local": {"size_bytes": "1KB"}},
    ),
    Row("a size without end", ("batch_bytes|or less",), {"batch_bytes": 10**30}),
    Row(
        "an unknown policy",
        ("write_policy is \"some\"|use 'write_through'",),
        {"write_policy": "some"},
    ),
    Row("an unknown load mode", ("load_mode is \"async\"|use 'sync'",), {"load_mode": "async"}),
    Row(
        "an unknown fingerprint",
        ("weights_fingerprint|use 'full'",),
        {"weights_fingerprint": "md5"},
    ),
    Row(
        "an unknown protocol",
        ("memcache.protocol is \"ib\"|use 'host_shm'",),
        _memcache(protocol="ib"),
    ),
    Row("an unknown log level", ("memcache.log_level|use 'debug'",), _memcache(log_level="loud")),
    Row(
        "a URL without scheme",
        ("meta_service_url|use for example tcp:",),
        _memcache(meta_service_url="h:5000"),
    ),
    Row(
        "a URL without port",
        ("config_store_url|use for example tcp:",),
        _memcache(config_store_url="tcp://h"),
    ),
    Row(
        "a port that cannot be",
        ("hcom_url|tcp://h:70000|use for example",),
        _memcache(hcom_url="tcp://h:70000"),
    ),
    Row(
        "a metrics URL over tcp",
        ("metrics_url|use for example http:",),
        _memcache(metrics_url="tcp://h:8000"),
    ),
    Row(
        "too many members",
        ("memcache.world_size is 4096|use 1024 or less",),
        _memcache(world_size=4096),
    ),
    Row("no copies", ("memcache.replicas is 0|use 1 or more",), _memcache(replicas=0)),
    Row(
        "members that are no list",
        ('preferred_members is "3"|JSON list',),
        _memcache(preferred_members="3"),
    ),
    Row(
        "more memory than the most", ("dram_size is larger|use less",), _memcache(dram_size="65GB")
    ),
    Row(
        "half a gigabyte over SDMA",
        ("dram_size|whole gigabytes",),
        _memcache(dram_size="512MB", protocol="device_sdma"),
    ),
    Row("a relative path", ("local.path: 'pages'|use one such as",), {"local": {"path": "pages"}}),
    Row(
        "provider options that are no object",
        ('provider is "x"|use a JSON object',),
        {"provider": "x"},
    ),
    Row(
        "keys named in logged arguments",
        ("memcache.tls|logged|@/path|set ASCEND_DIRECT_MEMCACHE__TLS__",),
        {"memcache": {"tls": {"decrypter_path": "/secret/place"}}},
    ),
)

VARIABLES = (
    Row(
        "a misspelled variable",
        (f"{ENV}MEMCACHE__HCOM_ULR|unset it|did you mean 'memcache.hcom_url'",),
        env={f"{ENV}MEMCACHE__HCOM_ULR": "tcp://h:1"},
    ),
    Row("a variable of nothing", (f"{ENV}VERBOSE|unset it",), env={f"{ENV}VERBOSE": "1"}),
    Row("a section as a variable", (f"{ENV}MEMCACHE|unset it",), env={f"{ENV}MEMCACHE": "{{}}"}),
    Row(
        "a variable of the wrong type",
        ('log_interval_s is "often"|use a whole number',),
        env={f"{ENV}LOG_INTERVAL_S": "often"},
    ),
    Row(
        "a variable that is not UTF-8",
        (f"{ENV}MODEL_ID is not UTF-8|set it",),
        env={f"{ENV}MODEL_ID": os.fsdecode(b"\xff")},
    ),
    Row(
        "a variable that is no JSON",
        ('provider is "{"|use a JSON object',),
        env={f"{ENV}PROVIDER": "{"},
    ),
    Row(
        "a variable inside what is no section",
        ("memcache is true|use a JSON object",),
        {"memcache": True},
        env={f"{ENV}MEMCACHE__HCOM_URL": "tcp://h:1"},
    ),
    Row(
        "half a TLS set-up",
        ("memcache.tls|set ca_path, key_path too",),
        env={f"{ENV}MEMCACHE__TLS__ENABLED": "1", f"{ENV}MEMCACHE__TLS__CERT_PATH": "/c"},
    ),
)

FLAGS = (
    Row(
        "options without the flag", (f"{CONFIG_FLAG} is given without {FLAG}|add|drop",), flag=False
    ),
    Row(
        "options without the flag, in YAML",
        (f"{CONFIG_FLAG} is given without {FLAG}|add|drop",),
        options=None,
        args=("--config", "{place}/server.yaml"),
        prepare=machines.existing_file(
            "server.yaml", b'hierarchical-cache-direct-config: \'{"store": "local"}\'\n'
        ),
        flag=False,
    ),
    Row(
        "the flag and SGLang's own linker options",
        ("--unified-cache-external-linker-config|move its content",),
        args=("--unified-cache-external-linker-config", "{}"),
    ),
    Row(
        "the flag and another linker",
        ("drop --unified-cache-external-linker-backend",),
        args=("--unified-cache-external-linker-backend", "mori"),
    ),
)

MODES = (
    Row("the radix cache off", ("drop --disable-radix-cache",), args=("--disable-radix-cache",)),
    Row(
        "another radix cache",
        ("--radix-cache-backend|drop it",),
        args=("--radix-cache-backend", "other"),
    ),
    Row("HiCache", ("--enable-hierarchical-cache|drop it",), args=("--enable-hierarchical-cache",)),
    Row(
        "HiCache's storage",
        ("--hicache-storage-backend|drop it",),
        args=("--hicache-storage-backend", "file"),
    ),
    Row("LMCache", ("--enable-lmcache|drop it",), args=("--enable-lmcache",)),
    Row("FlexKV", ("--enable-flexkv|drop it",), args=("--enable-flexkv",)),
    Row("MLA dedup", ("--enable-linker-mla-dedup|drop",), args=("--enable-linker-mla-dedup",)),
    Row("pipeline stages", ("--pp-size|use TP",), args=("--pp-size", "2")),
    Row("decode context parallelism", ("--dcp-size|use 1",), args=("--dcp-size", "2")),
    Row(
        "a role that may change",
        ("--enable-pd-role-switch|drop",),
        args=("--enable-pd-role-switch",),
    ),
    Row(
        "a host pool for retraction",
        ("--disaggregation-decode-retraction-backup host_pool|choose none",),
        args=("--disaggregation-decode-retraction-backup", "host_pool"),
    ),
    Row(
        "decode offload of HiCache",
        ("--disaggregation-decode-enable-offload-kvcache|drop it",),
        args=("--disaggregation-decode-enable-offload-kvcache",),
    ),
    Row("HiSparse", ("--enable-hisparse|drop it",), args=("--enable-hisparse",)),
    Row(
        "sparse KV on the host",
        ("SGLANG_NPU_ENABLE_SPARSE_KV_OFFLOAD|unset it",),
        env={"SGLANG_NPU_ENABLE_SPARSE_KV_OFFLOAD": "1"},
    ),
    Row("sharded KV", ("--enable-kv-cache-sharding|drop",), args=("--enable-kv-cache-sharding",)),
    Row("unified memory", ("--enable-unified-memory|drop",), args=("--enable-unified-memory",)),
    Row("page-major KV", ("page-major-kv-layout|drop",), args=("--enable-page-major-kv-layout",)),
    Row(
        "an EAGLE draft",
        ("--speculative-algorithm|drop",),
        args=("--speculative-algorithm", "EAGLE"),
    ),
    Row(
        "an n-gram draft",
        ("--speculative-algorithm|drop",),
        args=("--speculative-algorithm", "NGRAM"),
    ),
    Row(
        "a diffusion model", ("--dllm-algorithm|drop",), args=("--dllm-algorithm", "LowConfidence")
    ),
    Row(
        "session radix",
        ("--enable-session-radix-cache|drop",),
        args=("--enable-session-radix-cache",),
    ),
    Row("an encoder", ("--encoder-only|drop it",), args=("--encoder-only",)),
    Row("Ray", ("--use-ray|drop it",), args=("--use-ray",)),
    Row(
        "no KV cache at all (SGLang's check comes first)",
        ("--prefill-only-disable-kv-cache|requires --is-embedding",),
        args=("--prefill-only-disable-kv-cache",),
        raised_by_sglang=True,
    ),
    Row(
        "KV with scales (SGLang's check comes first)",
        ("--kv-cache-dtype mxfp8 requires",),
        args=("--kv-cache-dtype", "mxfp8"),
        raised_by_sglang=True,
    ),
    Row(
        "the embedded store for a GPU's memory",
        ("'local' cannot reach the memory of cuda|use memcache",),
        args=("--device", "cuda"),
    ),
)

MODELS = (
    Row(
        "a model without weights",
        ("cannot tell which weights|no weight files|model_id",),
        {"model_id": ""},
        args=("--model-path", "{place}/model"),
        prepare=machines.model_without(".safetensors"),
    ),
    Row(
        "a model without configuration (SGLang's check comes first)",
        ("{place}/model",),
        {"model_id": ""},
        args=("--model-path", "{place}/model"),
        prepare=machines.model_without(".json"),
        raised_by_sglang=True,
    ),
    Row(
        "weights from elsewhere",
        ("cannot tell which weights|custom_weight_loader|model_id",),
        {"model_id": ""},
        args=("--custom-weight-loader", "acme.load"),
    ),
    Row(
        "an adapter that is missing",
        ("cannot tell which weights '/no/adapter'",),
        args=("--enable-lora", "--lora-paths", "a=/no/adapter", "--max-lora-rank", "8"),
    ),
)

STORES = (
    Row(
        "a store that is not installed",
        ("'redis' is not installed|use another (local, memcache)",),
        {"store": "redis"},
    ),
    Row(
        "a provider that cannot be imported",
        ("store 'acme' fails|No module named 'acme_sdk'|install",),
        {"store": "acme"},
        prepare=machines.provider(
            machines.raising(ModuleNotFoundError("No module named 'acme_sdk'"))
        ),
    ),
    Row(
        "a provider that raises",
        ("store 'acme' fails (KeyError: 'bucket')|use another",),
        {"store": "acme"},
        prepare=machines.provider(lambda: machines.raising(KeyError("bucket"))),
    ),
    Row(
        "a provider that refuses its options",
        ("provider.bucket is missing; set it",),
        {"store": "acme"},
        prepare=machines.provider(
            lambda: machines.raising(ConfigError(["provider.bucket is missing; set it."]))
        ),
    ),
    Row(
        "a provider whose machine is not ready",
        ("acme has no licence|install",),
        {"store": "acme"},
        prepare=machines.provider(lambda: machines.unhappy_store),
    ),
    Row(
        "LMDB not installed",
        ("store 'local' fails|No module named 'lmdb'|install",),
        prepare=machines.without(
            "lmdb", "ascend_direct.store.local", "ascend_direct.store.local_file"
        ),
    ),
    Row(
        "a path below a file",
        ("local.path {place}/a/pages|name a directory you can write",),
        {"local": {"path": "{place}/a/pages"}},
        prepare=machines.existing_file("a"),
    ),
    Row(
        "a path that is a file",
        ("local.path {place}/a|name a directory you can write",),
        {"local": {"path": "{place}/a"}},
        prepare=machines.existing_file("a"),
    ),
    Row(
        "a path that cannot be made",
        ("local.path /proc/pages|name a directory you can write",),
        {"local": {"path": "/proc/pages"}},
    ),
    Row(
        "a path of nobody's home",
        ("home directory|use another",),
        {"local": {"path": "~no_such_user/pages"}},
    ),
    Row(
        "a path that others may write",
        ("local.path {place}/pages|writable by, others|name a new directory",),
        prepare=machines.pages(spoil=lambda folder: folder.chmod(0o777)),
    ),
    Row(
        "more pages than the disk holds",
        ("local.size_bytes is|has room for|make it smaller",),
        {"local": {"path": "{place}/pages", "size_bytes": "1000TB"}},
    ),
    Row(
        "another size than its neighbours have",
        ("local.path {place}/pages|size_bytes 4194304|use one size",),
        {"local": {"path": "{place}/pages", "size_bytes": "8MB"}},
        prepare=machines.pages(4 << 20),
    ),
    Row(
        "pages that were cut short",
        ("local.path {place}/pages|stop its servers and delete it",),
        {"local": {"path": "{place}/pages", "size_bytes": "4MB"}},
        prepare=machines.pages(spoil=lambda folder: os.truncate(folder / "data.mdb", 8192)),
    ),
    Row(
        "pages of another program",
        ("local.path {place}/pages|delete it",),
        {"local": {"path": "{place}/pages", "size_bytes": "4MB"}},
        prepare=machines.pages(spoil=lambda folder: (folder / "data.mdb").write_bytes(b"x" * 9000)),
    ),
)

POOLS = (
    Row(
        "memcache_hybrid not installed",
        ("memcache-hybrid is not installed|pip install",),
        MEMCACHE,
        prepare=machines.each(machines.a_pool, machines.without("memcache_hybrid")),
    ),
    Row(
        "another memcache_hybrid",
        ("memcache-hybrid 2.0.0 is installed|1.3.x is needed|pip install",),
        MEMCACHE,
        prepare=machines.each(machines.a_pool, machines.with_version("memcache-hybrid", "2.0.0")),
    ),
    Row(
        "no CANN",
        ("ASCEND_HOME_PATH|source its set_env.sh",),
        MEMCACHE,
        prepare=machines.each(machines.a_pool, machines.no_cann),
    ),
    Row(
        "a MetaService that is not started",
        ("tcp://127.0.0.1:1|start the MetaService|memcache.meta_service_url",),
        _memcache(meta_service_url="tcp://127.0.0.1:1"),
        prepare=machines.cann,
    ),
    Row(
        "a host that does not exist",
        ("tcp://no-such-host.invalid:5000|correct memcache.meta_service_url",),
        _memcache(meta_service_url="tcp://no-such-host.invalid:5000"),
        prepare=machines.cann,
    ),
    Row(
        "a host that does not answer",
        ("tcp://192.0.2.1:5000|start the MetaService",),
        _memcache(meta_service_url="tcp://192.0.2.1:5000"),
        prepare=machines.cann,
    ),
    Row(
        "a config store that is not started",
        ("tcp://127.0.0.1:1|start the MetaService|memcache.config_store_url",),
        _memcache(config_store_url="tcp://127.0.0.1:1"),
        prepare=machines.half_a_meta_service,
    ),
    Row(
        "an own address in use",
        ("memcache.hcom_url|is in use|set ASCEND_DIRECT_MEMCACHE__HCOM_URL",),
        MEMCACHE,
        prepare=machines.port_taken,
    ),
    Row(
        "an own address of another host",
        ("memcache.hcom_url|is not an address of this host|set ASCEND_DIRECT_MEMCACHE__HCOM_URL",),
        _memcache(hcom_url="tcp://192.0.2.1:7000"),
        prepare=machines.a_pool,
    ),
    Row(
        "a pool of another size",
        ("memcache.world_size is 256 but 8 in the pool|use the pool's",),
        MEMCACHE,
        prepare=machines.a_pool_of_eight,
    ),
    Row(
        "SDMA without an NPU",
        ("memcache.protocol device_sdma needs an NPU|use host_tcp",),
        _memcache(protocol="device_sdma"),
        prepare=machines.a_pool,
    ),
    Row(
        "RDMA of an NPU under emulation",
        ("memcache.protocol device_rdma is not emulated|use host_shm",),
        _memcache(protocol="device_rdma"),
        prepare=machines.each(machines.a_pool, machines.emulation),
    ),
    Row(
        "RDMA without a card",
        ("memcache.protocol host_rdma needs an RDMA network card|use host_tcp",),
        _memcache(protocol="host_rdma"),
        prepare=machines.a_pool,
    ),
    Row(
        "more memory than /dev/shm has",
        ("memcache.dram_size is 1024 MiB|1 MiB free|lower it",),
        _memcache(protocol="host_shm", dram_size="1GB"),
        prepare=machines.little_shared_memory,
    ),
    Row(
        "members that are no numbers",
        ("memcache.preferred_members: 'b'|use the number|pool member",),
        _memcache(preferred_members=["3", "b"]),
        prepare=machines.a_pool,
    ),
    Row(
        "a key that is not there",
        ("memcache.tls.key_path is not a file|set",),
        MEMCACHE,
        env={
            f"{ENV}MEMCACHE__TLS__ENABLED": "true",
            f"{ENV}MEMCACHE__TLS__CA_PATH": "{place}/ca.pem",
            f"{ENV}MEMCACHE__TLS__CERT_PATH": "{place}/ca.pem",
            f"{ENV}MEMCACHE__TLS__KEY_PATH": "{place}/secret.pem",
        },
        prepare=machines.each(machines.a_pool, machines.existing_file("ca.pem")),
    ),
)

SEVERAL = (
    Row(
        "SGLang of another version",
        (f"registry.create_tree is gone|get_storage_hash_str has no parameter ['size']|{INSTALL}",),
        prepare=machines.sglang_differs,
    ),
    Row(
        "mistakes of every kind",
        (
            f"{ENV}VERBOSE|unset it",
            'write_policy is "some"|use',
            "'stroe'|did you mean 'store'",
            "drop --disable-radix-cache",
            "--pp-size|use TP",
        ),
        options={"stroe": "local", "write_policy": "some"},
        args=("--disable-radix-cache", "--pp-size", "2"),
        env={f"{ENV}VERBOSE": "1"},
    ),
    Row(
        "a wrong mode on a machine that is not ready",
        (
            "--enable-lmcache|drop it",
            "memcache-hybrid is not installed|pip install",
            "ASCEND_HOME_PATH|source",
            "tcp://127.0.0.1:1|start the MetaService",
        ),
        _memcache(meta_service_url="tcp://127.0.0.1:1"),
        args=("--enable-lmcache",),
        prepare=machines.each(machines.without("memcache_hybrid"), machines.no_cann),
    ),
)

TABLE = (
    *(*TEXT, *OPTIONS, *VARIABLES, *FLAGS),
    *(*MODES, *MODELS, *STORES, *POOLS, *SEVERAL),
)
