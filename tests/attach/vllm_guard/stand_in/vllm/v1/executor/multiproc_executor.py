"""A stand-in: an executor with one worker in a process of its own."""

import multiprocessing
import os
import sys
import types


class WorkerProc:
    def __init__(self, worker):
        self.worker = worker

    @staticmethod
    def worker_main(config, folder, requests, answers):
        from repro.attach.vllm.guard.plugin import register

        register()
        from vllm.v1.worker.gpu_worker import Worker

        proc = WorkerProc(Worker(config, folder))
        try:
            proc.worker.init_device()
            proc.worker.load_model()
            proc.worker.determine_available_memory()
            answers.send("ready")
            while True:
                name, args = requests.recv()
                if name == "end":
                    break
                try:
                    answers.send(getattr(proc.worker, name)(*args))
                except Exception as error:
                    answers.send(error)
        finally:
            proc.shutdown()

    def shutdown(self):
        sys.stderr.flush()


class MultiprocExecutor:
    is_sleeping = False

    def __init__(self, config, folder):
        context = multiprocessing.get_context(os.environ["METHOD"])
        requests, self._requests = context.Pipe(duplex=False)
        self._answers, answers = context.Pipe(duplex=False)
        process = context.Process(target=WorkerProc.worker_main, args=(config, folder, requests, answers), daemon=True)
        process.start()
        answers.close()
        self.workers = [types.SimpleNamespace(proc=process)]
        self._receive()

    def execute_model(self, scheduler_output):
        return self._call("execute_model", scheduler_output)

    def execute_dummy_batch(self):
        return self._call("execute_dummy_batch")

    def end(self):
        self._requests.send(("end", ()))
        self.workers[0].proc.join(20)

    def _call(self, name, *args):
        self._requests.send((name, args))
        return self._receive()

    def _receive(self):
        answer = self._answers.recv()
        if isinstance(answer, Exception):
            raise RuntimeError(f"Worker failed with error '{answer}'")
        return answer
