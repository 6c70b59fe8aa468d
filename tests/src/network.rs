//! Two hosts and a link between them: network namespaces of this kernel, joined by a pair of
//! virtual Ethernets whose rates are shaped. Needs root, `ip` and `tc`.
//!
//! Processes are started in a host with [`Host::command`]; threads of this process move there
//! with [`Host::run`]. A socket stays in the host whose thread opened it.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Two hosts. Dropping it removes them; what runs there goes on without a network.
#[derive(Debug)]
pub struct Network {
    near: Host,
    far: Host,
}

/// One of the two.
#[derive(Debug)]
pub struct Host {
    namespace: String,
    address: IpAddr,
    other_address: IpAddr,
}

impl Network {
    /// Two hosts, and `mbps` million bits a second between them, each way.
    ///
    /// # Errors
    /// They cannot be made; says what is missing.
    pub fn start(mbps: u32) -> anyhow::Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "network namespaces need root; run this as root, or with sudo"
        );
        remove_abandoned();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let host = |name: &str, last: u8| Host {
            namespace: format!("kvasir-{}-{number}-{name}", std::process::id()),
            address: Ipv4Addr::new(10, 77, 0, last).into(),
            other_address: Ipv4Addr::new(10, 77, 0, last + 2).into(),
        };
        // Removed when one of the next steps fails.
        let network = Self {
            near: host("near", 1),
            far: host("far", 2),
        };
        let hosts = [&network.near, &network.far];
        for host in hosts {
            ip(&["netns", "add", &host.namespace])?;
        }
        let [near, far] = hosts.map(|host| host.namespace.as_str());
        let pair = ["type", "veth", "peer", "name", ETHERNET, "netns", far];
        ip(&[&["-n", near, "link", "add", ETHERNET][..], &pair].concat())?;
        for host in hosts {
            let name = host.namespace.as_str();
            for address in [host.address, host.other_address] {
                let address = format!("{address}/24");
                ip(&["-n", name, "address", "add", &address, "dev", ETHERNET])?;
            }
            ip(&["-n", name, "link", "set", "lo", "up"])?;
            ip(&["-n", name, "link", "set", ETHERNET, "up"])?;
        }
        network.set_mbps(mbps)?;
        Ok(network)
    }

    /// Where a client is.
    pub fn near(&self) -> &Host {
        &self.near
    }

    /// Where a daemon is.
    pub fn far(&self) -> &Host {
        &self.far
    }

    /// From now on `mbps` million bits a second pass, each way. As much waits for the link as
    /// passes in 20 ms, and 256 KiB at least, as in a switch; more is dropped.
    ///
    /// # Errors
    /// The kernel cannot shape traffic.
    pub fn set_mbps(&self, mbps: u32) -> anyhow::Result<()> {
        let rate = format!("{mbps}mbit");
        // What passes at once after a pause: a millisecond's worth, and one packet at least.
        let burst = (mbps * 125).max(4096).to_string();
        let queue = (mbps * 125 * QUEUE_MS).max(LEAST_QUEUE).to_string();
        for host in [&self.near, &self.far] {
            let shape = ["tbf", "rate", &rate, "burst", &burst, "limit", &queue];
            let device = ["qdisc", "replace", "dev", ETHERNET, "root"];
            let of = ["-n", &host.namespace];
            run("tc", &[&of[..], &device, &shape].concat())?;
        }
        Ok(())
    }

    /// Pulls the cable, or plugs it in again.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_up(&self, up: bool) -> anyhow::Result<()> {
        let state = if up { "up" } else { "down" };
        let far = self.far.namespace.as_str();
        ip(&["-n", far, "link", "set", ETHERNET, state])
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in [&self.near, &self.far] {
            // It may be half made. Its end of the link goes with it.
            let _ = ip(&["netns", "delete", &host.namespace]);
        }
    }
}

impl Host {
    /// Its address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Another one, for a relay.
    pub fn other_address(&self) -> IpAddr {
        self.other_address
    }

    /// What runs `command` there, as the same process.
    pub fn command(&self, command: &Command) -> Command {
        let mut there = Command::new("nsenter");
        there
            .arg(format!("--net={}", self.path()))
            .arg("--")
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => there.env(name, value),
                None => there.env_remove(name),
            };
        }
        there
    }

    /// Runs what `work` makes there, on threads of its own, until it has ended.
    ///
    /// # Errors
    /// A thread cannot move there.
    ///
    /// # Panics
    /// Where `work` does.
    pub fn run<T, F>(&self, work: impl FnOnce() -> F + Send) -> anyhow::Result<T>
    where
        T: Send,
        F: Future<Output = T>,
    {
        let host = File::open(self.path()).context("the host is gone")?;
        let workers = host.try_clone()?;
        let run = || {
            enter(&host).context("a thread cannot move to another network; run this as root")?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .on_thread_start(move || {
                    enter(&workers).expect("one thread could, so the others can");
                })
                .build()?;
            Ok(runtime.block_on(work()))
        };
        std::thread::scope(|scope| match scope.spawn(run).join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }

    fn path(&self) -> String {
        format!("{NAMESPACES}/{}", self.namespace)
    }
}

/// Removes hosts of processes that were killed and could not.
fn remove_abandoned() {
    let Ok(namespaces) = std::fs::read_dir(NAMESPACES) else {
        return;
    };
    for name in namespaces.flatten().map(|entry| entry.file_name()) {
        let name = name.to_string_lossy();
        let process = name
            .strip_prefix("kvasir-")
            .and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            // Another test may have been faster.
            let _ = ip(&["netns", "delete", &name]);
        }
    }
}

fn enter(host: &File) -> io::Result<()> {
    move_into_link_name_space(host.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(())
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    run("ip", arguments)
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| {
        format!("`{program}` cannot be run; on Debian, `apt-get install iproute2` installs it")
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{program} {}`: {}", arguments.join(" "), said.trim());
    }
    Ok(())
}

/// Milliseconds' worth of packets that wait for a link, and bytes of them at least.
const QUEUE_MS: u32 = 20;
const LEAST_QUEUE: u32 = 256 << 10;
/// Where `ip` keeps them.
const NAMESPACES: &str = "/run/netns";
/// The name of each host's end of the link.
const ETHERNET: &str = "eth0";
/// Of networks in this process.
static NUMBER: AtomicU32 = AtomicU32::new(0);
