//! Every carrier, over real sockets, held to the same promises.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

mod quic;
#[cfg(feature = "rdma")]
mod rdma;
mod shm;
mod suite;

/// The suite, for one carrier.
macro_rules! conforms {
    ($carrier:ty, $attribute:tt: $($test:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #$attribute
            async fn $test() {
                crate::suite::$test::<$carrier>().await;
            }
        )*
    };
    ($carrier:ty) => {
        crate::conforms!($carrier, #[cfg(all())]);
    };
    ($carrier:ty, #$attribute:tt) => {
        crate::conforms!($carrier, $attribute:
            many_requests_come_whole_over_one_connection
            a_refusal_says_why
            what_cannot_be_read_is_lost
            what_matters_more_overtakes
            a_holder_that_is_not_there_costs_no_more_than_the_deadline
            a_connection_serves_from_its_first_moment
            bytes_outlive_their_connection
            a_lost_connection_goes_on_with_what_is_missing
            what_is_given_up_costs_no_credit
            draining_ends_what_is_under_way_and_takes_nothing_new
        );
    };
}
pub(crate) use conforms;
