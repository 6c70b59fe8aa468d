//! What the kernel says about this process.

use std::fs;

/// Resident memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Resident {
    pub(crate) now: u64,
    pub(crate) peak: u64,
}

/// Of this process; zero where the kernel does not say.
pub(crate) fn resident() -> Resident {
    resident_of(std::process::id())
}

/// Of the process `pid`; zero where the kernel does not say.
pub(crate) fn resident_of(pid: u32) -> Resident {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .map_or_else(|_| Resident::default(), |text| parse(&text))
}

fn parse(status: &str) -> Resident {
    let bytes = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"))
            .and_then(|kib| kib.trim().parse::<u64>().ok())
            .map_or(0, |kib| kib << 10)
    };
    Resident {
        now: bytes("VmRSS:"),
        peak: bytes("VmHWM:"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let text = "Name:\tkvasird\nVmHWM:\t   20480 kB\nVmRSS:\t   10240 kB\n";
        let expected = Resident {
            now: 10 << 20,
            peak: 20 << 20,
        };
        assert_eq!(parse(text), expected);
        assert_eq!(parse("?"), Resident::default());
        assert!(resident().now > 0);
    }
}
