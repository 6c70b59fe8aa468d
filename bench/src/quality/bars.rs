//! Where our codec is beside others at equal quality: rows `bar/SERIES/…`.
//!
//! A series is `kvasir`, or with what a profile would give it, as `kvasir-alloc`; its points are those of its variants
//! that no cheaper one beats, bits against mean KL over all cells, with the logarithm of KL
//! taken as linear in between. Beyond its ends nothing is said, and there is no row.
//!
//! - `bar/SERIES/PEER/bits`: the bits of the series at the KL of the peer; `limit` the
//!   peer's bits, `ratio` how many times more these are;
//! - `bar/SERIES/cachegen-circulated`: the share of its bits; at most a half;
//! - `bar/SERIES/int4-hadamard`: bits less than it; at least 0.6;
//! - `bar/SERIES/kvtc…`: how many times fewer bits; at least 1.3;
//! - `bar/SERIES/10x`, `5x`: loss of exact match at a tenth, and a fifth, of 16 bits; at
//!   most 0.01 and 0.002. `…/kl` and `…/top1`: the same of these, without a bar.

use crate::report::{Report, Row};

/// What a variant takes, and what it costs.
#[derive(Clone, Debug)]
pub(super) struct Point {
    pub(super) name: String,
    pub(super) bits: f64,
    pub(super) kl: f64,
    pub(super) top1: f64,
    pub(super) em_loss: f64,
}

/// The method's name, and what is put before it.
pub(crate) fn series(name: &str) -> String {
    let (method, variant) = name.split_once(':').unwrap_or((name, ""));
    let parts = variant.split('-');
    let profile: Vec<&str> = parts
        .filter(|part| part.starts_with("klt") || ["alloc", "profile"].contains(part))
        .collect();
    [&[method], &profile[..]].concat().join("-")
}

/// The points that no cheaper one beats, by bits; of `(name, bits, kl)`.
fn front<'a>(points: &[&'a Point]) -> Vec<&'a Point> {
    let mut points = points.to_vec();
    points.sort_by(|a, b| a.bits.total_cmp(&b.bits));
    let mut front: Vec<&Point> = Vec::new();
    for point in points {
        if point.kl > 0.0 && front.last().is_none_or(|last| point.kl < last.kl) {
            front.push(point);
        }
    }
    front
}

/// Bits at which the series has that KL.
fn bits_at(front: &[&Point], kl: f64) -> Option<f64> {
    front.windows(2).find_map(|pair| {
        let (a, b) = (pair[0], pair[1]);
        let inside = b.kl <= kl && kl <= a.kl;
        let share = (a.kl / kl).ln() / (a.kl / b.kl).ln();
        inside.then_some(a.bits + share * (b.bits - a.bits))
    })
}

/// A measure at so many bits.
fn at_bits(front: &[&Point], bits: f64, of: impl Fn(&Point) -> f64) -> Option<f64> {
    front.windows(2).find_map(|pair| {
        let (a, b) = (pair[0], pair[1]);
        let inside = a.bits <= bits && bits <= b.bits;
        let share = (bits - a.bits) / (b.bits - a.bits);
        inside.then(|| of(a) + share * (of(b) - of(a)))
    })
}

/// Adds the rows of all bars that the points can answer.
pub(super) fn report(points: &[Point], report: &mut Report) {
    let mut ours: Vec<String> = points
        .iter()
        .map(|point| series(&point.name))
        .filter(|name| name.starts_with("kvasir"))
        .collect();
    ours.sort();
    ours.dedup();
    for name in ours {
        let all: Vec<&Point> = points.iter().filter(|p| series(&p.name) == name).collect();
        let front = front(&all);
        for peer in points.iter().filter(|p| !p.name.starts_with("kvasir")) {
            of_peer(&name, &front, peer, report);
        }
        for (times, limit) in [(10.0, 0.01), (5.0, 0.002)] {
            let bits = 16.0 / times;
            let row = |measure: &str| format!("bar/{name}/{times}x{measure}");
            let at = |of: fn(&Point) -> f64| at_bits(&front, bits, of);
            if let Some(loss) = at(|point| point.em_loss) {
                let held = if loss > 0.0 { limit / loss } else { 1.0 };
                report.push(Row::new(row(""), loss, "share").against(limit, held));
            }
            if let Some(kl) = at(|point| point.kl.ln()) {
                report.push(Row::new(row("/kl"), kl.exp(), "nats"));
            }
            if let Some(top1) = at(|point| point.top1) {
                report.push(Row::new(row("/top1"), top1, "share"));
            }
        }
    }
}

fn of_peer(name: &str, front: &[&Point], peer: &Point, report: &mut Report) {
    let Some(bits) = bits_at(front, peer.kl) else {
        return;
    };
    let row = |measure: &str| format!("bar/{name}/{}{measure}", peer.name);
    report.push(Row::new(row("/bits"), bits, "bit").against(peer.bits, peer.bits / bits));
    match series(&peer.name).as_str() {
        "cachegen-circulated" => {
            let share = bits / peer.bits;
            report.push(Row::new(row(""), share, "share").against(0.5, 0.5 / share));
        }
        "int4-hadamard" => {
            let fewer = peer.bits - bits;
            report.push(Row::new(row(""), fewer, "bit").against(0.6, fewer / 0.6));
        }
        "kvtc" => {
            let times = peer.bits / bits;
            report.push(Row::new(row(""), times, "times").against(1.3, times / 1.3));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(bits: f64, kl: f64) -> Point {
        Point {
            name: "kvasir".to_owned(),
            bits,
            kl,
            top1: 1.0 - kl,
            em_loss: kl / 10.0,
        }
    }

    #[test]
    fn the_logarithm_of_kl_is_linear_between_points_that_none_beats() {
        let points = [
            point(2.0, 0.04),
            point(1.0, 0.16),
            point(1.5, 0.5),
            point(3.0, 0.01),
        ];
        let all: Vec<&Point> = points.iter().collect();
        let front = front(&all);
        assert_eq!(front.len(), 3);
        assert!((bits_at(&front, 0.08).unwrap() - 1.5).abs() < 1e-9);
        assert!((bits_at(&front, 0.01).unwrap() - 3.0).abs() < 1e-9);
        assert_eq!(bits_at(&front, 0.001), None);
        assert!((at_bits(&front, 2.5, |p| p.em_loss).unwrap() - 0.0025).abs() < 1e-9);
        assert_eq!(at_bits(&front, 3.5, |p| p.em_loss), None);
    }

    #[test]
    fn a_series_is_a_method_and_its_transform() {
        assert_eq!(series("kvasir:s2-L1-kltall"), "kvasir-kltall");
        assert_eq!(series("kvasir:s2-L0-kltall-alloc"), "kvasir-kltall-alloc");
        assert_eq!(series("kvasir:profile-s2-L0"), "kvasir-profile");
        assert_eq!(series("kvasir:s2k0.5-L1"), "kvasir");
        assert_eq!(series("cachegen-circulated:L1"), "cachegen-circulated");
        assert_eq!(series("int4-hadamard"), "int4-hadamard");
    }
}
