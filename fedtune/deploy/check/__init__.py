"""What is wrong with a deployment's files on this machine, each finding with its fix."""

from fedtune.deploy.check.findings import Finding, State
from fedtune.deploy.check.roles import check_deployment

__all__ = ["Finding", "State", "check_deployment"]
