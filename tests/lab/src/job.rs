//! A script that runs in the emulated host.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Error, Result, bail};

use crate::agent::{Agent, Failure};
use crate::digest::last_lines;
use crate::watch::Watch;

/// How long the agent may take to start something.
const START: Duration = Duration::from_secs(120);

/// A running script. Dropped before its end, it is killed with everything in its session.
#[derive(Debug)]
pub struct Job {
    id: u64,
    leader: i32,
    name: String,
    folder: PathBuf,
    agent: Arc<Agent>,
    ended: UnixStream,
}

/// What a script left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; 128 and more for a signal, as the shell counts.
    pub status: i32,
    /// What it wrote to its standard output.
    pub stdout: String,
    /// What it wrote to its standard error.
    pub stderr: String,
}

impl Output {
    /// The standard output of what succeeded; else an error with all that it said.
    pub fn success(self) -> Result<String> {
        if self.status != 0 {
            let Self {
                status,
                stdout,
                stderr,
            } = self;
            bail!("exit status {status}; it wrote:\n{stdout}{stderr}");
        }
        Ok(self.stdout)
    }
}

/// A job's folder under the share, before it starts.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) id: u64,
    pub(crate) path: PathBuf,
}

impl Folder {
    /// Where the emulated host sees it.
    pub(crate) fn inside(&self) -> String {
        format!("/lab/jobs/{}", self.id)
    }

    pub(crate) fn start(self, agent: &Arc<Agent>, name: &str, script: &str) -> Result<Job> {
        fs::write(self.path.join("script"), script)?;
        let (leader, ended) = agent.start(self.id, START)?;
        Ok(Job {
            id: self.id,
            leader,
            name: name.to_owned(),
            folder: self.path,
            agent: Arc::clone(agent),
            ended,
        })
    }
}

impl Job {
    /// Waits for the end; at the limit kills the job, and says what it had written and what the host was doing.
    pub fn wait(&self, limit: Duration) -> Result<Output> {
        let status = self.agent.wait_done(self.id, limit);
        let status = status.map_err(|failure| match failure {
            Failure::Gone => {
                let written = format!("{} did not end\n{}", self.name, self.written());
                self.agent.death(&self.name).context(written)
            }
            Failure::TimedOut => {
                let error = self.timed_out(&self.name, limit);
                self.kill();
                error
            }
        })?;
        Ok(Output {
            status,
            stdout: self.read("stdout"),
            stderr: self.read("stderr"),
        })
    }

    /// Sends a signal, by its name without `SIG`, to every process of the job.
    pub fn signal(&self, name: &str) -> Result<()> {
        self.agent
            .order(&format!("SIGNAL {name} {}", self.leader))
            .map_err(|_| self.agent.death("a signal was sent"))
    }

    fn kill(&self) {
        // A host that does not answer is not waited for: whoever has it drops it.
        if self.signal("KILL").is_ok() && !self.agent.is_unresponsive() {
            let _ = self.agent.wait_done(self.id, Duration::from_secs(60));
        }
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        !self.agent.is_gone() && self.agent.status(self.id).is_none()
    }

    /// What it has written to its standard output until now.
    pub fn stdout(&self) -> String {
        self.read("stdout")
    }

    /// What it has written to its standard error until now.
    pub fn stderr(&self) -> String {
        self.read("stderr")
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The ends of what the job has written, and the VMM that it runs if it is a guest's.
    fn written(&self) -> String {
        const LINES: usize = 40;
        let mut text = String::new();
        for file in ["stdout", "stderr", "vmm.stderr"] {
            let end = last_lines(&self.read(file), LINES);
            if !end.is_empty() {
                text += &format!("-- its {file} ended\n{end}\n");
            }
        }
        text
    }

    fn timed_out(&self, doing: &str, limit: Duration) -> anyhow::Error {
        self.agent.timed_out(doing, limit, &self.written(), None)
    }

    fn read(&self, name: &str) -> String {
        // It has not written yet if there is no file.
        let bytes = fs::read(self.folder.join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until its standard output holds a line that `wanted` accepts, and returns that line.
    pub fn wait_line(&self, limit: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        self.wait_line_in("stdout", "a line", limit, wanted, || None)
    }

    /// The same for a line of another file in its folder; `what` names the line in an error. Where `hopeless` has an
    /// error, no more is waited for.
    pub(crate) fn wait_line_in(
        &self,
        file: &str,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
        hopeless: impl Fn() -> Option<Error>,
    ) -> Result<String> {
        let deadline = Instant::now() + limit;
        let watch = Watch::new(&self.folder)?;
        loop {
            let ended = !self.is_running();
            let text = self.read(file);
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            if let Some(line) = whole.lines().find(|line| wanted(line)) {
                return Ok(line.to_owned());
            }
            if let Some(error) = hopeless() {
                return Err(error);
            }
            if ended {
                bail!(
                    "{} ended without the line:\n{text}{}",
                    self.name,
                    self.stderr()
                );
            }
            match watch.wait(&self.ended, deadline) {
                Err(error) if error.kind() == ErrorKind::TimedOut => {
                    let doing = format!("{}: waiting for {what} in its {file}", self.name);
                    return Err(self.timed_out(&doing, limit));
                }
                outcome => outcome?,
            }
        }
    }

    /// Copies its outputs as they grow, until its end.
    pub fn follow(
        &self,
        limit: Duration,
        stdout: &mut impl Write,
        stderr: &mut impl Write,
    ) -> Result<i32> {
        let deadline = Instant::now() + limit;
        let watch = Watch::new(&self.folder)?;
        let mut out = Growing::new(self.folder.join("stdout"));
        let mut err = Growing::new(self.folder.join("stderr"));
        loop {
            let ended = !self.is_running();
            out.copy(stdout)?;
            err.copy(stderr)?;
            if ended {
                let status = self.agent.status(self.id);
                return status.ok_or_else(|| self.agent.death(&self.name));
            }
            match watch.wait(&self.ended, deadline) {
                Err(error) if error.kind() == ErrorKind::TimedOut => {
                    return Err(self.timed_out(&self.name, limit));
                }
                outcome => outcome?,
            }
        }
    }
}

/// A file that another process makes, and appends to.
struct Growing {
    path: PathBuf,
    file: Option<File>,
}

impl Growing {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    fn copy(&mut self, sink: &mut impl Write) -> Result<()> {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok();
        }
        if let Some(file) = &mut self.file {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            sink.write_all(&bytes)?;
            sink.flush()?;
        }
        Ok(())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.is_running() {
            self.kill();
        }
    }
}
