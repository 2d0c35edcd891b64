"""The JobSet as Kubernetes will read it: against the models of its API (jobset.x-k8s.io/v1alpha2) in kubeflow-trainer-api."""

import math

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from elastic_jax.errors import UserError
from tests.launch.cloud import LAUNCH, Cloud

RUN = ('run', '--name', 'star', '--image', 'registry/elastic:1', '--bucket', 'b')
TRAIN = ('--', '--config', "it's.py", '--config.stages.short.steps=5')


def check(manifest):
    """Every field is one of the API's, with a value of its kind: what the models do not know is lost on the way through them."""
    assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    (slices,) = manifest['spec']['replicatedJobs']
    job = slices['template']['spec']
    assert job['parallelism'] == job['completions']
    assert job['backoffLimit'] == 0  # a lost host fails its Job at once, and with it the set
    # Wrong arguments fail it for a reason of their own, which is no reason to start again.
    (refused,), (ended,) = job['podFailurePolicy']['rules'], manifest['spec']['failurePolicy']['rules']
    assert (refused['action'], refused['onExitCodes']) == ('FailJob', {'operator': 'In', 'values': [UserError.status]})
    assert (ended['action'], ended['onJobFailureReasons']) == ('FailJobSet', ['PodFailurePolicy'])
    pod = job['template']['spec']
    assert pod['restartPolicy'] == 'Never'  # else Kubernetes refuses a podFailurePolicy
    chips = pod['containers'][0]['resources']['limits']['google.com/tpu']
    topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
    assert job['parallelism'] * chips == math.prod(map(int, topology.split('x')))
    return slices, pod


def test_the_file_itself_is_a_job_set():
    check(yaml.safe_load((LAUNCH / 'jobset.yaml').read_text()))


def test_a_misspelt_field_would_be_found():
    manifest = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
    manifest['spec']['failurePolicy']['maxRestart'] = manifest['spec']['failurePolicy'].pop('maxRestarts')
    with pytest.raises(AssertionError):
        check(manifest)


def test_options_land_in_their_fields_and_go_to_kubectl(tmp_path):
    cloud = Cloud(tmp_path)
    options = ('--topology', '2x2x4', '--hosts', '4', '--slices', '3', '--restarts', '7', '--accelerator', 'tpu-v4-podslice')
    done = cloud.call('jobset.sh', *RUN, *options, *TRAIN)
    assert done.returncode == 0, done.stderr
    ((*command, text),) = cloud.calls()
    assert command == ['kubectl', 'apply', '--filename=-']
    manifest = yaml.safe_load(text)
    slices, pod = check(manifest)
    assert manifest['metadata']['name'] == 'star'
    assert manifest['spec']['failurePolicy']['maxRestarts'] == 7
    assert slices['replicas'] == 3
    assert pod['nodeSelector']['cloud.google.com/gke-tpu-accelerator'] == 'tpu-v4-podslice'
    (container,) = pod['containers']
    assert container['image'] == 'registry/elastic:1'
    assert container['args'] == [*TRAIN[1:], '--workdir=gs://b/star', '--config.compilation_cache=gs://b/compilation_cache']
    dry = cloud.call('jobset.sh', *RUN, *options, '--dry-run', *TRAIN)
    assert yaml.safe_load(dry.stdout.split("<<'EOF'\n")[1].removesuffix('EOF\n')) == manifest
