"""A federation on real machines: `fedtune deploy init` writes its files, `fedtune deploy check` says what is wrong.

    plan.py           what a deployment is: host names, nodes, ports; deployment.json
    certificates.py   the CA, the certificates it signs, the keys of the nodes
    settings.py       server.env and node.env, which shell scripts and `check` read
    scripts.py        the shell scripts, server.py and node.py: the files of each side, services.py: systemd and compose
    init.py           writes all of it, adds a node, renews the server's certificate
    weights.py        a fingerprint of a model folder
    check/            one question a file

This is the one part of `fedtune` that looks at the network, and only `check` does.
"""
