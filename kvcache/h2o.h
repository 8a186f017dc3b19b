/* h2o - a look into the policy's account, for tests; the policy is policies/h2o.c. */
#ifndef VITRAIL_KVCACHE_H2O_H
#define VITRAIL_KVCACHE_H2O_H

#include "kvcache/policy.h"

/* h2o_account - scores and positions of all lanes, in device memory; valid while the policy is open. */
const struct heavy_hitters *h2o_account(const struct policy *policy);

#endif
