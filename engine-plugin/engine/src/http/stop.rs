//! Stop strings in text that arrives in pieces.

/// Watches one sequence for its stop strings.
#[derive(Debug, Default)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    /// Text that could be the beginning of a stop string.
    held: String,
}

/// What a piece of text leads to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Released {
    /// Text that is certain to belong to the answer.
    pub(super) text: String,
    /// Whether a stop string followed it.
    pub(super) stopped: bool,
}

impl StopStrings {
    /// Watches for `stops`; none of them is empty.
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Adds text. Up to the earliest stop string is released, and nothing
    /// after it; without one, all but an end that may become one.
    pub(super) fn push(&mut self, text: &str) -> Released {
        self.held += text;
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop))
            .min();
        if let Some(at) = found {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(at);
            return Released {
                text,
                stopped: true,
            };
        }
        let keep = self.held.split_off(self.certain());
        Released {
            text: std::mem::replace(&mut self.held, keep),
            stopped: false,
        }
    }

    /// What was held when no more text comes.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the held text without the longest end that begins a stop string.
    fn certain(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        (from..self.held.len())
            .filter(|&at| self.held.is_char_boundary(at))
            .find(|&at| {
                let end = &self.held[at..];
                self.stops.iter().any(|stop| stop.starts_with(end))
            })
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stops(stops: &[&str]) -> StopStrings {
        StopStrings::new(stops.iter().map(|&s| s.to_owned()).collect())
    }

    fn released(text: &str, stopped: bool) -> Released {
        let text = text.to_owned();
        Released { text, stopped }
    }

    #[test]
    fn nothing_is_held_without_stop_strings() {
        assert_eq!(stops(&[]).push("abc"), released("abc", false));
    }

    #[test]
    fn a_beginning_is_held_until_it_is_decided() {
        let mut stops = stops(&["END", "\n\n"]);
        assert_eq!(stops.push("the E"), released("the ", false));
        assert_eq!(stops.push("N"), released("", false));
        assert_eq!(stops.push("E"), released("EN", false));
        assert_eq!(stops.push("ND of it"), released("", true));
    }

    #[test]
    fn the_earliest_wins() {
        let mut stops = stops(&["late", "a"]);
        assert_eq!(stops.push("x late a"), released("x ", true));
    }

    #[test]
    fn what_is_held_at_the_end_belongs_to_the_text() {
        let mut stops = stops(&["END"]);
        assert_eq!(stops.push("EN"), released("", false));
        assert_eq!(stops.finish(), "EN");
    }

    proptest! {
        /// However the text is cut, the result is that of the whole text.
        #[test]
        fn cuts_do_not_matter(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stop in prop::collection::vec("[abé]{1,4}", 0..4),
        ) {
            let whole = pieces.concat();
            let mut watch = StopStrings::new(stop.clone());
            let mut text = String::new();
            let mut stopped = false;
            for piece in &pieces {
                let released = watch.push(piece);
                text += &released.text;
                stopped = released.stopped;
                if stopped {
                    break;
                }
            }
            text += &watch.finish();
            prop_assert!(whole.starts_with(&text));
            prop_assert!(stop.iter().all(|stop| !text.contains(stop.as_str())));
            let held = stop.iter().any(|stop| whole.contains(stop.as_str()));
            prop_assert_eq!(stopped, held);
            if stopped {
                let rest = &whole[text.len()..];
                prop_assert!(stop.iter().any(|stop| rest.starts_with(stop.as_str())));
            } else {
                prop_assert_eq!(text, whole);
            }
        }
    }
}
