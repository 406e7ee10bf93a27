# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Run chosen tests many times and print how often each failed; the output of failures is kept."""

import argparse
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example: python tests/repeat.py 30 tests/test_distributed.py -k killed',
    )
    parser.add_argument('times', type=int, help='how often')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/repeat'), help='failures')
    args, args.pytest = parser.parse_known_args()
    return args


def run_once(pytest_args, log):
    """Run pytest once; the state of each test: passed, failed or skipped."""
    results = log.with_suffix('.xml')
    results.unlink(missing_ok=True)
    command = [sys.executable, '-m', 'pytest', '-q', f'--junitxml={results}', *pytest_args]
    with open(log, 'w') as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    states = {}
    if results.exists():
        for case in ElementTree.parse(results).iter('testcase'):
            kinds = {child.tag for child in case}
            state = 'failed' if kinds & {'failure', 'error'} else 'skipped'
            name = f'{case.get("classname")}::{case.get("name")}'
            states[name] = state if kinds & {'failure', 'error', 'skipped'} else 'passed'
        results.unlink()
    # pytest itself ended otherwise than its tests, or collected none.
    if code != 0 and 'failed' not in states.values():
        states[f'pytest, exit code {code}'] = 'failed'
    return states


def main():
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    counts = {'passed': Counter(), 'failed': Counter(), 'skipped': Counter()}
    for number in range(1, args.times + 1):
        log, start = args.out / f'{time.strftime("%Y%m%d_%H%M%S")}_{number}.log', time.time()
        states = run_once(args.pytest, log)
        for name, state in states.items():
            counts[state][name] += 1
        failed = [name for name, state in states.items() if state == 'failed']
        print(f'{number} of {args.times}: {time.time() - start:.0f} s', *failed, flush=True)
        if not failed:
            log.unlink()
    names = sorted(set().union(*counts.values()))
    for name in names:
        ran = counts['passed'][name] + counts['failed'][name]
        print(f'{counts["failed"][name]} of {ran} failed, {args.times - ran} not run: {name}')
    if counts['failed']:
        sys.exit(f'the output of failures is in {args.out}')


if __name__ == '__main__':
    main()
