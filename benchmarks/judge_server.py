"""The fixture's judge behind one or more addresses of a server with rates; prints them and serves until it is ended.

python benchmarks/judge_server.py --addresses 4 --decode 6000
"""

import argparse
import threading
from contextlib import ExitStack
from dataclasses import fields

from judge_captions import FixtureJudge

from tests.support.judge_rates import Rates, token_ids
from tests.support.judge_server import JudgeServer

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--addresses", type=int, default=1)
    for rate in fields(Rates):
        parser.add_argument(f"--{rate.name.replace('_', '-')}", type=type(rate.default), default=rate.default)
    options = vars(parser.parse_args())
    addresses = options.pop("addresses")
    token_ids("")  # the vocabulary is read before anybody waits for a reply
    with ExitStack() as stack:
        servers = [stack.enter_context(JudgeServer(FixtureJudge(), rates=Rates(**options))) for _ in range(addresses)]
        print(" ".join(server.base_url for server in servers), flush=True)
        threading.Event().wait()
