#!/usr/bin/env bash
# Trains as a JobSet on Google Kubernetes Engine, a pod for each host of a TPU
# slice (https://jobset.sigs.k8s.io).
#
#   NAME=boolq-xxl IMAGE=europe-docker.pkg.dev/me/prompt_tuning TOPOLOGY=4x4 \
#     ACCELERATOR=tpu-v5-lite-podslice HOSTS=4 CHIPS=4 ./scripts/launch/jobset.sh \
#     models/t5_1_1_xxl runs/prompt_tune ... MODEL_DIR=gs://bucket/run
#
# Arguments are those of `prompt-tuning train`; --dry_run prints the manifest. IMAGE
# has Python 3.11 and prompt_tuning[tpu]. A pod that is lost restarts the whole
# set, up to RESTARTS times [20]; the run goes on from its last checkpoint. A
# fault of the user's (exit code 1 or 2) does not.
# QUEUE is a local queue of Kueue, in which job sets wait for slices: so a study's do,
# with --executor=scripts/launch/jobset.sh, which names each.
# HOSTS pods have CHIPS chips each; SERVICE_ACCOUNT may read and write gs://.
set -euo pipefail
: "${NAME:?of the job set}" "${IMAGE:?with the package}"
: "${TOPOLOGY:?such as 4x4}" "${ACCELERATOR:?such as tpu-v5-lite-podslice}"
: "${HOSTS:?of the slice}" "${CHIPS:?of a host}"

apply=(kubectl apply -f -)
arguments=()
for argument in "$@"; do
  if [ "$argument" = --dry_run ]; then
    apply=(cat)
  else
    arguments+=("$argument")
  fi
done
# A JSON list is YAML too, and knows how to quote.
list="$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \
  prompt-tuning train "${arguments[@]}")"

"${apply[@]}" << MANIFEST
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  labels: {${QUEUE:+kueue.x-k8s.io/queue-name: $QUEUE}}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-20}
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: $HOSTS
        completions: $HOSTS
        backoffLimit: 0
        podFailurePolicy:
          rules:
          # Faults of the user: to start again would not mend them.
          - action: FailJob
            onExitCodes:
              operator: In
              values: [1, 2]
        template:
          spec:
            restartPolicy: Never
            serviceAccountName: ${SERVICE_ACCOUNT:-default}
            # SIGTERM first: the run saves before the pod goes.
            terminationGracePeriodSeconds: 120
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
            containers:
            - name: train
              image: $IMAGE
              command: $list
              ports:
              - containerPort: 8471
              - containerPort: 8476
              resources:
                requests:
                  google.com/tpu: $CHIPS
                limits:
                  google.com/tpu: $CHIPS
MANIFEST
