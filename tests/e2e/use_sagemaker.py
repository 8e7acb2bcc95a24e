"""SageMaker's client boto3, unmodified. It runs in the environment of other systems' clients.

Standard input is JSON: ``url``, ``key``, and ``calls`` with the arguments of ``invoke_endpoint``, or with an
``InputLocation`` those of ``invoke_endpoint_async``. ``Body`` is in base64. Standard output is a list with
the answer or the error of each call.
"""

from __future__ import annotations

import base64
import json
import sys

import boto3
import botocore.config
import botocore.exceptions


def main() -> None:
    given = json.load(sys.stdin)
    client = boto3.client(
        "sagemaker-runtime",
        endpoint_url=given["url"],
        region_name="eu-central-1",
        aws_access_key_id=given["key"],
        aws_secret_access_key="not needed",
        config=botocore.config.Config(retries={"max_attempts": 0}, proxies={}),
    )
    print(json.dumps([call(client, **each) for each in given["calls"]]))


def call(client, **arguments):
    """Return the members of an answer that the test compares, or the error as boto3 reads it."""
    if "InputLocation" in arguments:
        try:
            accepted = client.invoke_endpoint_async(**arguments)
        except botocore.exceptions.ClientError as refused:
            return {"error": refused.response["Error"]}
        return {name: accepted[name] for name in ("InferenceId", "OutputLocation", "FailureLocation")}
    body = base64.b64decode(arguments.pop("Body"))
    try:
        answer = client.invoke_endpoint(**arguments, Body=body)
    except botocore.exceptions.ClientError as refused:
        return {"error": refused.response["Error"]}
    names = ("ContentType", "InvokedProductionVariant", "CustomAttributes")
    found = {name: answer.get(name) for name in names}
    return found | {"Body": base64.b64encode(answer["Body"].read()).decode()}


main()
