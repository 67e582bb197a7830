"""Two operations that are compiled on the machine at their first use.

The lab's scenarios need them, to show what such a build does to the start of a server. They compute the same as the
references, but no choice of the registry selects them: a server asks for one with
`EngineConfig.gdn_prefill_backend` or `EngineConfig.moe_backend` = "jit".
"""
