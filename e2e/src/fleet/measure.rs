//! CPU time and memory of the controller, from /proc.

use std::time::Instant;

use anyhow::{Context as _, Result};

/// CPU time and memory of a process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Usage {
    /// The time of the reading.
    pub(super) at: Instant,
    /// CPU time in seconds, threads that ended included.
    pub(super) cpu: f64,
    /// Resident memory in MiB.
    pub(super) memory: f64,
}

impl Usage {
    /// Reads it.
    pub(super) fn of(process: u32) -> Result<Self> {
        let path = format!("/proc/{process}/stat");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        // The name in parentheses may have spaces.
        let fields: Vec<_> =
            text.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
        let number = |index: usize| -> Result<f64> {
            let field: &str = fields.get(index).with_context(|| format!("{path} is too short"))?;
            field.parse().with_context(|| format!("{path}: {field:?} is no number"))
        };
        let (ticks, page) = (system(libc::_SC_CLK_TCK)?, system(libc::_SC_PAGESIZE)?);
        Ok(Self {
            at: Instant::now(),
            cpu: (number(11)? + number(12)?) / ticks,
            memory: number(21)? * page / f64::from(1 << 20),
        })
    }

    /// CPU time since an earlier reading as a share of one core, in percent.
    pub(super) fn core_percent_since(&self, before: &Self) -> f64 {
        100.0 * (self.cpu - before.cpu) / self.at.duration_since(before.at).as_secs_f64()
    }
}

fn system(name: libc::c_int) -> Result<f64> {
    // SAFETY: sysconf takes no pointers.
    let value = unsafe { libc::sysconf(name) };
    anyhow::ensure!(value > 0, "the system does not know its configuration value {name}");
    Ok(value as f64)
}

/// Thousands of connections need as many descriptors.
pub(super) fn raise_descriptor_limit() -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a valid pointer to a structure of this function.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    anyhow::ensure!(raised, "raising the limit of open files: {}", std::io::Error::last_os_error());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_of_this_process_grows() {
        let before = Usage::of(std::process::id()).unwrap();
        assert!(before.memory > 1.0);
        while Usage::of(std::process::id()).unwrap().cpu - before.cpu < 0.02 {}
    }
}
