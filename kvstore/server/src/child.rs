//! `kvasird` as a child process, for the demo, tests and benchmarks.

use std::ffi::OsStr;
use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use kvasir_types::ByteSize;
use rustix::process::{Pid, Signal};

/// A process that printed where it listens. Killed when dropped.
#[derive(Debug)]
pub struct ListeningChild {
    child: Child,
    address: String,
}

/// Why a child process does not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChildError {
    /// It cannot be started, signalled or waited for.
    #[error("`{program}` cannot be run as a child process")]
    Process {
        /// The program.
        program: String,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// It ended before it listened.
    #[error("`{program}` ended before it listened; its log above says why")]
    Silent {
        /// The program.
        program: String,
    },
    /// It ended, and not well.
    #[error("`{program}` ended with {status}; its log above says why")]
    Failed {
        /// The program.
        program: String,
        /// How it ended.
        status: ExitStatus,
    },
}

impl ListeningChild {
    /// Starts `command` and waits for its line `listening on ADDRESS`.
    ///
    /// # Errors
    /// It cannot be started, or ends before that line.
    pub fn start(mut command: Command) -> Result<Self, ChildError> {
        let program = command.get_program().to_string_lossy().into_owned();
        let failed = |source| ChildError::Process {
            program: program.clone(),
            source,
        };
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let stdout = child.stdout.take().expect("its output is piped");
        let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
        let address = lines.find_map(|line| Some(line.strip_prefix("listening on ")?.to_owned()));
        let Some(address) = address else {
            kill(&mut child);
            return Err(ChildError::Silent { program });
        };
        // Keep reading, so that it never blocks on a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self { child, address })
    }

    /// Where it listens, `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Largest resident memory so far (`VmHWM`); 0 where the kernel does not say.
    pub fn peak_resident_bytes(&self) -> u64 {
        crate::process::resident_of(self.child.id()).peak
    }

    /// Stops it as an operator would, with SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// It does not end well.
    pub fn stop(mut self) -> Result<(), ChildError> {
        let program = format!("process {}", self.child.id());
        let failed = |source: io::Error| ChildError::Process {
            program: program.clone(),
            source,
        };
        rustix::process::kill_process(self.pid(), Signal::TERM)
            .map_err(|errno| failed(errno.into()))?;
        let status = self.child.wait().map_err(failed)?;
        if status.success() {
            Ok(())
        } else {
            Err(ChildError::Failed { program, status })
        }
    }
}

impl Drop for ListeningChild {
    fn drop(&mut self) {
        kill(&mut self.child);
    }
}

/// Its arguments are those of `kvasird`, set here so that parents agree on them.
pub fn daemon_command(program: &OsStr, data_dir: &Path, memory: ByteSize, listen: &str) -> Command {
    let mut command = Command::new(program);
    command.arg("--data-dir").arg(data_dir).args([
        "--memory",
        &memory.to_string(),
        "--listen",
        listen,
    ]);
    command
}

/// Writes every file under `dir` out and asks the kernel to drop its cached pages, so
/// that what is read next comes from the medium.
///
/// # Errors
/// A file cannot be opened or synced.
pub fn drop_page_cache(dir: &Path) -> io::Result<()> {
    let mut pending: Vec<PathBuf> = vec![dir.to_owned()];
    while let Some(path) = pending.pop() {
        if path.is_dir() {
            for entry in std::fs::read_dir(&path)? {
                pending.push(entry?.path());
            }
        } else {
            let file = std::fs::File::open(&path)?;
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    Ok(())
}

fn kill(child: &mut Child) {
    // It may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
}
